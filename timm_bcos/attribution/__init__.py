"""Post-hoc attribution methods, to compare with the explanations of B-cos networks."""

import timm  # noqa: F401  (first of all: then our networks register, which import this room)

from . import methods, transformers  # noqa: F401  (each method registers itself)
