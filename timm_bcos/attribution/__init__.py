"""Post-hoc attribution methods, for comparison with the explanations of B-cos models."""

from . import methods, transformers  # noqa: F401  (each method registers itself)
