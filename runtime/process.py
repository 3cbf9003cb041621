"""How a module of ours runs in a process of its own."""

from __future__ import annotations

import sys

SAFE_PATH = ("-P",) if sys.version_info >= (3, 11) else ()  # the working folder must not shadow packages


def module_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs `python -m module arguments` with this Python."""
    return [sys.executable, *SAFE_PATH, "-m", module, *arguments]
