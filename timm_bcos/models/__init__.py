"""The registered networks, and how to get one by name or from a checkpoint."""
