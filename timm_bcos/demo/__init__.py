"""Explanations as web pages that need no network."""

import timm  # noqa: F401  (first of all: then our networks register, which import this room)
