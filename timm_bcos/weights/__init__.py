"""Weights: where they are published, how they are fetched and read, and which formats they come in."""

import timm  # noqa: F401  (first of all: then our networks register, which import this room)
