"""A run's tensors in checkpoints: model and optimizer, sharded by torch's DCP, read back in any layout.

What else lies in a checkpoint is in `folder.py`, how one is saved in `saver.py`, and read in `reader.py`. The learning
rate, the order of samples and dropout masks are functions of (config, seed, step): the step and the seed are the
schedule's, the data's and the generators' whole state.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tessera.checkpoint.folder import verify
from tessera.checkpoint.reader import Reader, read_into
from tessera.checkpoint.state import RunState
from tessera.core.collectives import gathered
from tessera.core.errors import UserError
from tessera.engine.on_shards import OnShards
from tessera.engine.optimizer import Optimizer
from tessera.models.decoder import Decoder
from tessera.nn.parameter import as_stored, named_specs

MODEL, OPTIMIZER = "model/", "optimizer/"


def model_tensors(model: Decoder) -> dict[str, Tensor]:
    """Every parameter by its name in a checkpoint."""
    return {f"{MODEL}{name}": as_stored(p, spec, model.parallel) for name, p, spec in named_specs(model)}


def optimizer_tensors(model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state of each trained parameter (zeros before its first step) by its name in a checkpoint."""
    assert isinstance(optimizer, Optimizer)
    tensors: dict[str, Tensor] = {}
    for name, parameter, spec in named_specs(model):
        if not parameter.requires_grad:
            continue
        for key, value in optimizer.moments(parameter).items():
            moment = value.shape == parameter.shape  # else a count
            tensors[f"{OPTIMIZER}{name}/{key}"] = as_stored(value, spec, model.parallel) if moment else value
    return tensors


def load(folder: Path, model: Decoder, optimizer: torch.optim.Optimizer) -> RunState:
    """Read a checkpoint of any layout into `model` and `optimizer`; collective. Returns what was saved as its state.

    A checkpoint without optimizer state leaves `optimizer` as it is. Raises UserError, before any tensor is read, when
    the folder is not a whole checkpoint of this model or a file of it is altered.
    """
    reader, tensors = Reader(folder), model_tensors(model)
    moments = {}
    if reader.state.optimizer:
        moments = optimizer_tensors(model, optimizer)
        if tensors.keys() == {name for name in reader.metadata.state_dict_metadata if name.startswith(MODEL)}:
            _check_optimizer(reader, moments)
    _read(reader, tensors | moments, model)
    if moments and isinstance(optimizer, OnShards):  # it keeps them in a form of its own
        for name, parameter, _ in named_specs(model):
            if parameter.requires_grad:
                start = f"{OPTIMIZER}{name}/"
                own = {key.removeprefix(start): value for key, value in moments.items() if key.startswith(start)}
                optimizer.take(parameter, own)
    return reader.state


def _check_optimizer(reader: Reader, moments: Mapping[str, Tensor]) -> None:
    """Raise UserError where the checkpoint's optimizer is of another kind, or of other parameters."""
    stored = {name for name in reader.metadata.state_dict_metadata if name.startswith(OPTIMIZER)}
    if stored == set(moments):
        return
    kinds, wanted = ({name.rpartition("/")[2] for name in names} for names in (stored, moments))
    key = "unfrozen_parameters" if kinds == wanted else "optimizer"
    reason = f"the state of its optimizer ({', '.join(sorted(kinds)) or 'none'}) is of another {key}"
    hint = f"write {key} as the run that made it had it, or start anew from its model (tessera convert)"
    raise UserError("resume_from_checkpoint", reader.folder, reason, hint)


def load_model(folder: Path, model: Decoder) -> None:
    """Read the weights of a checkpoint alone; otherwise like `load`."""
    _read(Reader(folder), model_tensors(model), model, MODEL)


def _read(reader: Reader, tensors: dict[str, Tensor], model: Decoder, only: str = "") -> None:
    of_ranks = gathered({name: tuple(tensor.shape) for name, tensor in tensors.items()}, model.parallel.mesh.world)
    check_model(reader, {name: shape for shapes in of_ranks for name, shape in shapes.items()}, only)
    verify(reader.folder)
    with alone_is_fine():
        read_into(reader, tensors)


def check_model(reader: Reader, shapes: Mapping[str, Sequence[int]], only: str = "") -> None:
    """Raise UserError unless the checkpoint holds just these tensors, of these shapes (of names that begin `only`)."""
    stored = reader.metadata.state_dict_metadata
    found = {
        name: list(entry.size)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(only)
    }
    for name in sorted(found.keys() | shapes.keys()):  # model/ comes before optimizer/
        there = found.get(name, "no such tensor")
        expected = list(shapes[name]) if name in shapes else "no such tensor"
        if there != expected:
            reason = f"is of another model: {name}: expected {expected}, found {there}"
            raise UserError("resume_from_checkpoint", reader.folder, reason)


@contextmanager
def alone_is_fine() -> Iterator[None]:
    """No warning of DCP that there is but one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
