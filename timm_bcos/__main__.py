"""The entry point of `timm-bcos` and `python -m timm_bcos`; `torchrun -m timm_bcos run train.py ...` needs the second.

It imports next to nothing until errors and signals are handled.
"""

from .cli.exceptions import exit_status

__all__ = ["main"]


def main() -> None:
    """Run the command; errors are one line, without a traceback."""
    raise SystemExit(exit_status(_command))


def _command() -> None:
    from .cli.app import start

    start()


if __name__ == "__main__":
    main()
