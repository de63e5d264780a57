"""Concepts: directions among a layer's channels, through which every logit is a sum of concepts, and each of pixels."""
