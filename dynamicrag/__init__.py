"""Shared code of the DynamicRAG stages: files, rows, models, search, the LLM, evaluation, rewards and the report."""

__version__ = "0.1.0"
