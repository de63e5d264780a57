"""Explanations: how they are computed, what they hold, how they are checked, drawn and exported."""

import timm  # noqa: F401  (first of all: then our networks register, which import this room)
