"""Search: passages, their embeddings, and the indexes that are searched."""
