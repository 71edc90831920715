"""What has been measured on this machine and is kept: JSON files in the user's cache, named by what they hold for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skipnet_rt.util.atomic import replacing


def path(kind: str, identity: Mapping[str, Any]) -> Path:
    """Where it is kept: in ``$XDG_CACHE_HOME/skipnet-rt``, usually ``~/.cache/skipnet-rt``.

    Args:
        kind: begins the file's name.
        identity: all that the measurement holds for.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skipnet-rt"
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"{kind}-{name}.json"


def save(file: Path, document: Mapping[str, Any]) -> None:
    """Write a file in one step, so that another process never reads half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
