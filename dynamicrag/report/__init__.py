"""The report: one HTML page of the tables, figures and cases of a results folder."""
