"""From any network to its B-cos equivalent: the config, the rules, the plan, and the converted network."""

import timm  # noqa: F401  (first of all: then our networks register, which import this room)
