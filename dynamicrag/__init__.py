"""What the stages of DynamicRAG share: the contract between them, files, prompts, identifiers, models and scores."""

__version__ = "0.1.0"
