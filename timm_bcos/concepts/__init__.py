"""Concepts: directions among a layer's channels, through which every logit is a sum of concepts, and each of pixels."""

import timm  # noqa: F401  (first of all: then our networks register, which import this room)
