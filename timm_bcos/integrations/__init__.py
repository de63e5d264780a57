"""Other libraries that take B-cos layers for linear ones; `timm_bcos.libraries` says when each is told."""

import timm  # noqa: F401  (first of all: then our networks register, which import this room)
