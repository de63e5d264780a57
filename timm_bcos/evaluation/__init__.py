"""What judges attributions: the grid pointing game, metrics, inner neurons, galleries."""

import timm  # noqa: F401  (first of all: then our networks register, which import this room)
