"""What judges attributions: the grid pointing game, metrics, inner neurons, galleries."""
