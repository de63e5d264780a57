"""The layers: torch's and timm's, with one step of `forward` changed."""

import timm  # noqa: F401  (first of all: then our networks register, which import this room)
