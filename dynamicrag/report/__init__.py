"""The report: an HTML page with the tables, figures and cases of a results folder."""
