"""Post-hoc attribution methods, to compare with the explanations of B-cos networks."""

from . import methods, transformers  # noqa: F401  (each method registers itself)
