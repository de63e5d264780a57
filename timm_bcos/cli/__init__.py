"""The command line `timm-bcos`."""
