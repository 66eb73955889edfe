"""Embeddings of a collection: how they lie on disk, are made and are searched."""
