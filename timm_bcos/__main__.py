"""`python -m timm_bcos`, which `torchrun -m timm_bcos run train.py ...` needs."""

from .cli.main import main

if __name__ == "__main__":
    main()
