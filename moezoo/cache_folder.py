"""Where what was found out once is kept for later commands of the same user."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return ``$MOEZOO_CACHE``, or ``moezoo`` in the user's cache; it need not be there."""
    return Path(
        os.environ.get("MOEZOO_CACHE")
        or os.path.join(
            os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "moezoo"
        )
    )
