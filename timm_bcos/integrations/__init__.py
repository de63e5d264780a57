"""Other libraries that take B-cos layers for linear ones; `timm_bcos.integrations.registration` says when each is told."""
