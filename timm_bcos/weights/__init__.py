"""Weights: where they are published, how they are fetched and read, and which formats they come in."""
