"""Rows: the questions, documents, selections and scores that one stage writes and the next one reads."""
