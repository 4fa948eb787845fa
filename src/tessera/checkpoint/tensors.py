"""A run's tensors in checkpoints: model and optimizer, sharded by torch's DCP, read back in any layout.

What else lies in a checkpoint is in `checkpoint_folder.py`, how one is saved in `saver.py`. The learning rate, the
order of samples and dropout masks are functions of (config, seed, step): the step and the seed are the schedule's, the
data's and the generators' whole state.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from tessera.checkpoint.folder import Reader, read_state, verify
from tessera.checkpoint.state import RunState
from tessera.core.collectives import gathered
from tessera.core.errors import UserError
from tessera.models.decoder import Decoder
from tessera.nn.parameter import as_stored, named_specs

MODEL = "model/"


def model_tensors(model: Decoder) -> dict[str, Tensor]:
    """Every parameter by its name in a checkpoint."""
    return {f"{MODEL}{name}": as_stored(p, spec, model.parallel) for name, p, spec in named_specs(model)}


def optimizer_tensors(model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state of each parameter (zeros before its first step) by its name in a checkpoint."""
    tensors: dict[str, Tensor] = {}
    for name, parameter, spec in named_specs(model):
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter.detach())
            state["exp_avg_sq"] = torch.zeros_like(parameter.detach())
        for key, value in state.items():
            moment = value.shape == parameter.shape  # else a count
            tensors[f"optimizer/{name}/{key}"] = as_stored(value, spec, model.parallel) if moment else value
    return tensors


def load(folder: Path, model: Decoder, optimizer: torch.optim.Optimizer) -> RunState:
    """Read a checkpoint of any layout into `model` and `optimizer`; collective. Returns what was saved as its state.

    A checkpoint without optimizer state leaves `optimizer` as it is. Raises UserError, before any tensor is read, when
    the folder is not a whole checkpoint of this model or a file of it is altered.
    """
    state, tensors = read_state(folder), model_tensors(model)
    if state.optimizer:
        tensors |= optimizer_tensors(model, optimizer)
    reader = Reader(folder)
    of_ranks = gathered({name: tuple(tensor.shape) for name, tensor in tensors.items()}, model.parallel.mesh.world)
    check_model(reader, {name: shape for shapes in of_ranks for name, shape in shapes.items()})
    verify(folder)
    try:
        with alone_is_fine():
            dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (CheckpointException, ValueError, KeyError) as error:
        raise UserError("resume_from_checkpoint", folder, f"cannot be read: {reason_of(error)}") from error
    return state


def check_model(reader: Reader, shapes: Mapping[str, Sequence[int]], only: str = "") -> None:
    """Raise UserError unless the checkpoint holds just these tensors, of these shapes (of names that begin `only`)."""
    stored = reader.metadata.state_dict_metadata
    found: dict[str, list[int]] = {
        name: list(getattr(entry, "size", [])) for name, entry in stored.items() if name.startswith(only)
    }
    for name in sorted(found.keys() | shapes.keys()):  # model/ comes before optimizer/
        there = found.get(name, "no such tensor")
        expected = list(shapes[name]) if name in shapes else "no such tensor"
        if there != expected:
            reason = f"is of another model: {name}: expected {expected}, found {there}"
            raise UserError("resume_from_checkpoint", reader.folder, reason)


def reason_of(error: BaseException) -> str:
    """In one line what went wrong, on which rank where DCP has gathered it from several."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    causes = {rank: e[0] if isinstance(e, tuple) else e for rank, e in sorted(failures.items())}
    told = "; ".join(f"rank {rank}: {cause}" if dist.is_initialized() else f"{cause}" for rank, cause in causes.items())
    return (told or str(error) or type(error).__name__).partition("\n")[0]


@contextmanager
def alone_is_fine() -> Iterator[None]:
    """No warning of DCP that there is but one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
