"""Title embeddings."""
