"""The command ``storenode``: what an operator types."""

from storenode.cli.main import main

__all__ = ["main"]
