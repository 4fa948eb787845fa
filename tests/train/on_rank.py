"""What runs on the ranks of a pool: a module of its own, so that workers do not import transformers."""

import io
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from support.mesh import shared_mesh
from tessera.checkpoint.saver import HostCopies, Writer
from tessera.config.schema import TrainConfig
from tessera.core.errors import RunFailed, UserError
from tessera.core.mesh import Mesh
from tessera.train.build import Built, rates_of
from tessera.train.links import run_mesh
from tessera.train.run import Run, model_of, prepared_run
from tessera.train.trainer import train


def _shared(*arguments: Any) -> Mesh:
    mesh = run_mesh(*arguments)
    return shared_mesh(mesh.sizes, mesh.numbering)


def train_on_rank(settings: dict[str, Any]) -> None:
    run_on_rank(handed_on_rank(settings).to_json())


def run_on_rank(handed: str) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the pool talks over gloo
    undrawn = patch("tessera.train.records.plot_loss", lambda records: b"")  # a tenth of a second of each run
    with patch("tessera.train.build.run_mesh", _shared), undrawn:
        train(Run.from_json(handed))


def handed_on_rank(settings: dict[str, Any]) -> Run:
    """The run as a launcher hands it to every rank: made by one process, JSON for the others."""
    made: list[Any] = [None]
    if own_rank() == 0:
        try:
            with redirect_stdout(io.StringIO()):  # a launcher says it, no rank
                made = [prepared_run(TrainConfig.model_validate(settings), 1).to_json()]
        except UserError as error:
            made = [(error.key, str(error.value), error.reason, error.hint)]
    if dist.is_initialized():
        dist.broadcast_object_list(made)
    if isinstance(made[0], tuple):
        raise UserError(*made[0])
    return Run.from_json(made[0])


def train_on_machines(settings: dict[str, Any], here: int) -> str:
    """What a run prints whose ranks are on machines of `here` each, as far as it knows."""
    with patch.dict(os.environ, {"LOCAL_WORLD_SIZE": str(here)}):
        return said_on_rank(settings)


def numbering_on_machines(settings: dict[str, Any], here: tuple[int, ...]) -> tuple[str, ...]:
    """How the ranks of a run are numbered of which each sees `here[rank]` on its machine."""
    config = TrainConfig.model_validate(settings)
    with patch.dict(os.environ, {"LOCAL_WORLD_SIZE": str(here[own_rank()])}):
        return run_mesh(config, model_of(config), torch.device("cpu"), torch.float32).numbering


def refusal_on_rank(settings: dict[str, Any]) -> str:
    try:
        train_on_rank(settings)
    except (UserError, RunFailed) as error:
        return str(error)
    raise AssertionError("the run did not fail")


def said_on_rank(settings: dict[str, Any]) -> str:
    """What a run prints, and how it fails if it does."""
    with redirect_stdout(io.StringIO()) as out:
        try:
            train_on_rank(settings)
        except (UserError, RunFailed) as error:
            print(f"{type(error).__name__}: {error}")
    return out.getvalue()


def said_with_profiles(settings: dict[str, Any], cache: str) -> str:
    """What a run prints whose machine has the profiles that lie in a cache folder."""
    with patch.dict(os.environ, {"XDG_CACHE_HOME": cache}):
        return said_on_rank(settings)


def said_where_predicting_fails(settings: dict[str, Any]) -> str:
    with patch("tessera.train.foresee.foresee_run", side_effect=ZeroDivisionError("no step at all")):
        return said_on_rank(settings)


# ---- Saves that go wrong


@contextmanager
def _writing(act: Callable[[Writer], None]) -> Iterator[None]:
    """`act` whenever this rank begins to write its tensors."""
    real = Writer.write_data

    def write_data(self: Writer, *args: Any) -> Any:
        act(self)
        return real(self, *args)

    with patch.object(Writer, "write_data", write_data):
        yield


def failing_on_rank(settings: dict[str, Any], steps: set[int], rank: int) -> str:
    """What a run prints in which this rank's disk is full at saves of these steps."""

    def fill(writer: Writer) -> None:
        if writer.state.step in steps and own_rank() == rank:
            raise OSError(28, "No space left on device")

    with _writing(fill):
        return said_on_rank(settings)


def limited_on_rank(settings: dict[str, Any], step: int, limit: int) -> str:
    """What a run prints in which the kernel lets files grow to `limit` bytes only, during the save of one step."""
    none = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit_size(writer: Writer) -> None:
        soft = limit if writer.state.step == step and own_rank() == 1 else none[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, none[1]))

    try:
        with _writing(limit_size):
            return said_on_rank(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, none)


def slow_save_on_rank(settings: dict[str, Any], step: int, until: int) -> str:
    """A run whose save of `step` copies slowly and writes nothing until step `until` has been done."""
    log = Path(settings["output_dir"]) / "metrics.jsonl"

    def wait(writer: Writer) -> None:
        end = time.monotonic() + 20
        while writer.state.step == step and log.read_text().count("\n") < until and time.monotonic() < end:
            time.sleep(0.002)

    def copy(self: HostCopies, *args: Any) -> Any:
        time.sleep(0.005)
        return real(self, *args)

    real = HostCopies._copy
    with _writing(wait), patch.object(HostCopies, "_copy", copy):
        return said_on_rank(settings)


@contextmanager
def stopping(step: int | None) -> Iterator[None]:
    """A request to stop during this step, on rank 0 alone."""

    def stop(built: Built) -> Callable[[int], float]:
        rates = rates_of(built)

        def rate(index: int) -> float:
            if index + 1 == step and own_rank() == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return rates(index)

        return rate

    with patch("tessera.train.trainer.rates_of", stop):
        yield


def stopped_on_rank(settings: dict[str, Any], step: int, fails: bool) -> str:
    """What a run prints that is asked to stop during a step, and whose save then fails or not."""
    with stopping(step):
        return failing_on_rank(settings, {step} if fails else set(), 1)


def own_rank() -> int:
    """This process's rank; 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0
