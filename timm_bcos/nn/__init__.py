"""The layers: torch's and timm's, with one step of `forward` changed."""
