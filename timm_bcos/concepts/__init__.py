"""Concepts: directions of a layer's features. Logits are sums of concepts, and concepts are sums of pixels."""
