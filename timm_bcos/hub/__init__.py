"""From a trained network to the Hugging Face Hub."""

import timm  # noqa: F401  (first of all: then our networks register, which import this room)
