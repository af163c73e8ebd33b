"""Evaluation: metrics of answers, selections and retrieval, and tables of results."""
