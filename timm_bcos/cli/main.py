"""The entry point of `timm-bcos`: it imports next to nothing before errors and signals are under control."""

from .exceptions import exit_status

__all__ = ["main"]


def main() -> None:
    """Run the command; errors are one line, without a traceback."""
    raise SystemExit(exit_status(_command))


def _command() -> None:
    from .app import app

    app()
