"""The commands of `timm-bcos`, a file each: what they are asked, and what they do with it."""
