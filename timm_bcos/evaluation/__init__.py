"""Evaluation of attributions and models: the grid pointing game, metrics, inner units, galleries, comparisons."""
