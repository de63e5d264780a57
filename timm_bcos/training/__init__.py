"""Training with explanations: W(x) as a function of the parameters, losses on it, and tasks for timm's train.py."""

import timm  # noqa: F401  (first of all: then our networks register, which import this room)
