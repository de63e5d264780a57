"""One explanation as a static HTML page that needs no server."""

import timm  # noqa: F401  (first of all: then our models register, which import this package)
