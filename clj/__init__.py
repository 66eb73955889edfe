"""Contrastive and joint-embedding learning in JAX."""
