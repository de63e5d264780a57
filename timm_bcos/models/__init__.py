"""The registered networks, and how to get one by name or from a checkpoint."""

import timm  # noqa: F401  (first of all: then our networks register, which import this room)
