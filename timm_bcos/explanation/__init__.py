"""Explanations: how they are computed, what they hold, how they are checked, drawn and exported."""
