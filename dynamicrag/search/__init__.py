"""Search: passages, their embeddings, and the dense and BM25 indexes."""
