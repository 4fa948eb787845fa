"""Measurements kept from run to run: a JSON file in the user's cache folder, read and written by rank 0 alone.

    {"format": "...", "measured": {key: {name: milliseconds}}}

A file that is broken, or not ours, counts as empty and is replaced.
"""

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from tessera.core.files import read_json

_FORMAT = "tessera schedules, 2"


def cache_folder() -> Path:
    """Where what was measured on this machine is kept for later runs of the same user; need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "tessera"


class Remembered:
    """What was measured under one `key`: JSON values that say all that the measurement depends on."""

    def __init__(self, key: dict[str, Any]) -> None:
        self.key = json.dumps(key, sort_keys=True)
        self.path = cache_folder() / "schedules.json"

    def read(self, names: list[str]) -> list[float] | None:
        """Milliseconds of each of `names`; None when not all are known."""
        entry = self._measured().get(self.key)
        times = [entry.get(name) for name in names] if isinstance(entry, dict) else []
        good = [t for t in times if isinstance(t, float) and math.isfinite(t) and t > 0]
        return good if names and len(good) == len(names) else None

    def write(self, milliseconds: dict[str, float]) -> str | None:
        """Keep these, beside what other keys have; says why when the folder cannot be written."""
        whole = {"format": _FORMAT, "measured": self._measured() | {self.key: milliseconds}}
        aside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(whole, indent=1) + "\n")
            os.replace(aside, self.path)
        except OSError as error:
            with suppress(OSError):
                aside.unlink()
            return f"what was measured could not be kept: {error}"
        return None

    def _measured(self) -> dict[str, Any]:
        try:
            whole = read_json(self.path, "measured")
        except ValueError:  # a UserError is one
            return {}
        ours = isinstance(whole, dict) and whole.get("format") == _FORMAT
        measured = whole.get("measured") if ours else None
        return measured if isinstance(measured, dict) else {}
