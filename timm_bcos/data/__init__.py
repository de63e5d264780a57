"""Images as the tools read them: photos, and labeled data sets."""

import timm  # noqa: F401  (first of all: then our networks register, which import this room)
