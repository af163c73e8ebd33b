"""Rows: the questions, documents, selections and scores that the stages hand to each other."""
