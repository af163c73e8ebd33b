"""Evaluation: metrics of answers, selections and retrieval, and the tables of results."""
