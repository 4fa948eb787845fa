"""Runs whose files fail at a chosen moment: for the ranks of a pool, as on_rank.py."""

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any
from unittest.mock import patch

from support.disk import leave_free
from tessera.checkpoint.saver import Writer
from tessera.models import hub
from tessera.train.events import Events
from tessera.train.notes import METRICS
from train.on_rank import own_rank, said_on_rank


@contextmanager
def _before_logging(act: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """`act`, with what is to be logged, before rank 0 logs a step."""
    real = Events.step

    def logged(self: Events, record: dict[str, Any]) -> None:
        if own_rank() == 0:
            act(record)
        real(self, record)

    with patch.object(Events, "step", logged):
        yield


def _said(settings: dict[str, Any]) -> tuple[str, str]:
    with redirect_stderr(io.StringIO()) as err:
        return said_on_rank(settings), err.getvalue()


def removing_on_rank(settings: dict[str, Any], step: int) -> tuple[str, str]:
    """What a run prints on stdout and stderr whose folder is removed after a step."""

    def remove(record: dict[str, Any]) -> None:
        if record["step"] == step:
            Path(settings["output_dir"]).rename(f"{settings['output_dir']}.away")
            shutil.rmtree(f"{settings['output_dir']}.away")

    with _before_logging(remove):
        return _said(settings)


def filling_on_rank(settings: dict[str, Any], disk: Path, first: int, last: int) -> tuple[str, str]:
    """What a run prints whose disk is full from step `first` until step `last`."""

    def fill(record: dict[str, Any]) -> None:
        record["padding"] = "x" * 5000  # beyond the page that the file has
        if record["step"] == first:
            leave_free(disk, 0)
        if record["step"] == last:
            (disk / "ballast").unlink()

    with _before_logging(fill):
        return _said(settings)


def unloggable_on_rank(settings: dict[str, Any]) -> tuple[str, str]:
    """What a run prints in whose way somebody puts a folder, where its log was."""

    def put(record: dict[str, Any]) -> None:
        if record["step"] == 1:
            log = Path(settings["output_dir"]) / METRICS
            log.unlink()
            log.mkdir()

    with _before_logging(put):
        return _said(settings)


def failing_export_on_rank(settings: dict[str, Any], error: OSError) -> str:
    """What a run prints whose first file of weights cannot be written on rank 0."""

    def fail(*_: object) -> None:
        raise error

    with patch.object(hub, "write_tensors", fail):
        return said_on_rank(settings)


def failing_end_on_rank(settings: dict[str, Any], error: OSError) -> str:
    """What a run prints whose model cannot be written, nor its last checkpoint when that is first tried."""
    write_data, failures = Writer.write_data, [error]

    def fail_once(self: Writer, *arguments: Any) -> Any:
        if self.final.name == f"checkpoint-{settings['max_steps']}" and failures:
            raise failures.pop()
        return write_data(self, *arguments)

    with patch.object(Writer, "write_data", fail_once):
        return failing_export_on_rank(settings, error)
