"""The trackers of a run: those that its config asks for, opened, told of steps and closed. None of them can end it."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from tessera.config.schema import TrainConfig
from tessera.config.sections.trackers import Tracker as Name
from tessera.core.errors import UserError, cut_short
from tessera.train.events import Sink
from tessera.train.trackers.mlflow import Mlflow
from tessera.train.trackers.tensorboard import TensorBoard
from tessera.train.trackers.tracker import Tracker, numbers_of
from tessera.train.trackers.trackio import Trackio
from tessera.train.trackers.wandb import Wandb

TABLE: dict[Name, Callable[[TrainConfig, Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}
"""Each is opened with the config, output_dir and the steps done before; its package is imported then."""


def check_trackers(config: TrainConfig) -> None:
    """Raise UserError where the package of a tracker that is asked for is not installed."""
    for name, key in config.trackers.items():
        found = find_spec(name)
        if found is None or found.origin is None:  # the latter is a folder of that name, with an older run's files
            reason = f"needs the package {name}, which is not installed"
            raise UserError(key, getattr(config, key), reason, f"pip install {name}, or remove the key")


class Trackers(Sink):
    """The trackers of one run, on its first rank. What one of them raises is told once, and the run goes on without."""

    def __init__(self, config: TrainConfig, output: Path, first_step: int, say: Callable[[str], None]) -> None:
        self._say, self._open = say, dict[str, Tracker]()
        for name in config.trackers:
            with self._failing_alone(name):
                self._open[name] = TABLE[name](config, output, first_step)
            if name in self._open:
                say(f"{name}: {self._open[name].where}")

    def step(self, record: Mapping[str, Any], shown: bool) -> None:
        """Tell all of them a line of metrics.jsonl that is shown, or has an evaluation."""
        if not (shown or "eval_loss" in record):
            return
        numbers = numbers_of(record)
        for name, tracker in list(self._open.items()):
            with self._failing_alone(name):
                tracker.step(record["step"], numbers)

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            with self._failing_alone(name):
                tracker.close()
        self._open.clear()

    @contextmanager
    def _failing_alone(self, name: str) -> Generator[None]:
        try:
            with redirect_stdout(StringIO()):  # libraries print what would break a progress bar
                yield
        except Exception as error:  # of any kind: a tracker is worth less than the run
            if (failed := self._open.pop(name, None)) is not None:
                with suppress(Exception):
                    failed.close()
            self._say(f"{name} failed, the run goes on without it: {cut_short(error, 300)}")
