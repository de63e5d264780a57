"""The registered models, and how to get one by name or from a checkpoint."""
