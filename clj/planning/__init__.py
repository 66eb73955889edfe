"""A step compiled for a pod that is not here, and what its program says."""
