"""The `dte` command: see app.py."""

from dte_lab.cli.app import main

__all__ = ["main"]
