"""What replaces each kind of module in a conversion; `timm_bcos.conversion.rules` is the table."""
