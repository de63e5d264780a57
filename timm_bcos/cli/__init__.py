"""The command `timm-bcos`, and what the scripts share with it."""
