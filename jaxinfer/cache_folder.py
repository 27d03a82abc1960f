"""Where this user's computer keeps what is measured and compiled."""

from __future__ import annotations

import os
from pathlib import Path


def default_folder() -> Path | None:
    """JAXINFER_CACHE_DIR, else XDG_CACHE_HOME/jaxinfer, else ~/.cache/jaxinfer; None without a home."""
    if chosen := os.environ.get("JAXINFER_CACHE_DIR"):
        return Path(os.path.abspath(os.path.expanduser(chosen)))
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    return Path(base) / "jaxinfer" if os.path.isabs(base) else None
