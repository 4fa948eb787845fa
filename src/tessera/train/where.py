"""Where a rank is: which step, which phase of it. Told to its launcher too, for a rank that is killed cannot say it."""

import os
from contextlib import suppress
from pathlib import Path

WHERE = "where.txt"
"""Beside the error file that a launcher gives a rank."""
_WIDTH = 60


class Where:
    """The step (0: before the first) and phase of this rank."""

    def __init__(self) -> None:
        self.step, self.phase = 0, "building the model"
        self._file: int | None = None
        if errors := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            with suppress(OSError):
                self._file = os.open(Path(errors).with_name(WHERE), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.enter(self.phase)

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}" if self.step else self.phase

    def enter(self, phase: str, step: int | None = None) -> None:
        """Go on to another phase; forward and backward come once for each micro-batch."""
        self.phase, self.step = phase, self.step if step is None else step
        if self._file is not None:
            with suppress(OSError):
                os.pwrite(self._file, str(self).ljust(_WIDTH).encode(), 0)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def where_was(error_file: str | Path) -> str:
    """Where the rank with this error file last was; empty when it has not said."""
    try:
        return Path(error_file).with_name(WHERE).read_text().strip()
    except (OSError, ValueError):
        return ""
