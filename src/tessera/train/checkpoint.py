"""Checkpoints: model and optimizer sharded by torch's DCP, everything else in one JSON file; whole or not there.

    output_dir/checkpoint-N/    .metadata, __R_0.distcp     what DCP writes: every tensor, each rank its shards
                                state.json                  step, data position, seed, tokens; written last

A checkpoint is written as `.checkpoint-N.part` and renamed when every rank has finished: a folder with the final name
is whole. The learning rate, the order of samples and dropout masks are functions of (config, seed, step): the step and
the seed are the schedule's, the data's and the generators' whole state.
"""

import io
import itertools
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from tessera.errors import UserError

STATE = "state.json"
FORMAT = 1


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of the run by name: parameters, and the optimizer's state of each (zeros before its first step)."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model/{name}"] = parameter.detach()
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter.detach())
            state["exp_avg_sq"] = torch.zeros_like(parameter.detach())
        tensors |= {f"optimizer/{name}/{key}": value for key, value in state.items()}
    return tensors


def save(
    output_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int | None,
) -> Path:
    """Write `checkpoint-{state["step"]}` and return it; collective. Keeps the newest `keep` checkpoints (None: all)."""
    final = output_dir / f"checkpoint-{state['step']}"
    part = output_dir / f".{final.name}.part"
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        for unfinished in output_dir.glob(".checkpoint-*.part"):  # of a killed run
            shutil.rmtree(unfinished)
        part.mkdir(parents=True)
    _barrier()
    writer = dcp.FileSystemWriter(part, sync_files=True)
    with _alone_is_fine():
        dcp.save(_tensors(model, optimizer), storage_writer=writer, no_dist=not dist.is_initialized())
    if first:
        with (part / STATE).open("w") as file:
            file.write(json.dumps({"format": FORMAT, **state}, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        if keep:  # this one always, even beside those with higher numbers that a run gone back leaves behind
            others = [path for path in whole_checkpoints(output_dir) if path != final]
            for old in others[: max(0, len(others) - keep + 1)]:
                shutil.rmtree(old)
    _barrier()
    return final


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read a checkpoint of any layout into `model` and `optimizer`; collective. Returns what `save` was given as state.

    Raises UserError when the folder is not a whole checkpoint of this model.
    """
    state, tensors = read_state(folder), _tensors(model, optimizer)
    _check_model(folder, tensors)
    try:
        with _alone_is_fine():
            dcp.load(tensors, storage_reader=_Reader(folder), no_dist=not dist.is_initialized())
    except (CheckpointException, ValueError, KeyError) as error:
        causes = getattr(error, "failures", {})
        reason = "; ".join(str(e[0] if isinstance(e, tuple) else e) for e in causes.values()) or str(error)
        raise UserError("resume_from_checkpoint", folder, f"cannot be read: {reason}") from error
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint. Raises UserError when that is of another format or any file is not whole."""
    try:
        state = json.loads((folder / STATE).read_text())
    except (OSError, ValueError) as error:
        raise _not_whole(folder, f"{STATE}: {error}") from error
    if state.get("format") != FORMAT:
        raise UserError(
            "resume_from_checkpoint", folder, f"has format {state.get('format')}, this version reads {FORMAT}"
        )
    _check_files(folder)
    return dict(state)


def _check_files(folder: Path) -> None:
    """Raise UserError unless every file that .metadata counts on lies in `folder`, as long as it says."""
    ends: dict[str, int] = {}
    for entry in _read_metadata(folder).storage_data.values():
        ends[entry.relative_path] = max(ends.get(entry.relative_path, 0), entry.offset + entry.length)
    for name, end in sorted(ends.items()):
        if Path(name).name != name or not (folder / name).is_file():
            raise _not_whole(folder, f"{name} is missing")
        size = (folder / name).stat().st_size
        if size < end:
            raise _not_whole(folder, f"{name} is truncated, it has {size} of {end} bytes")


def _check_model(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Raise UserError unless the checkpoint holds just these tensors, of these shapes."""
    stored = _read_metadata(folder).state_dict_metadata
    shapes: dict[str, list[int]] = {name: list(getattr(entry, "size", [])) for name, entry in stored.items()}
    for name in sorted(shapes.keys() | tensors.keys()):  # model/ comes before optimizer/
        found = shapes.get(name, "no such tensor")
        expected = list(tensors[name].shape) if name in tensors else "no such tensor"
        if found != expected:
            reason = f"is of another model: {name}: expected {expected}, found {found}"
            raise UserError("resume_from_checkpoint", folder, reason)


def whole_checkpoints(output_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [
        (int(m[1]), p) for p in output_dir.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    ]
    return [path for _, path in sorted(found) if (path / STATE).is_file() and (path / ".metadata").is_file()]


def set_aside(output_dir: Path, after: int) -> list[Path]:
    """Rename the checkpoints of steps beyond `after` to abandoned-…, so that none is taken for a new run's."""
    renamed = []
    for path in whole_checkpoints(output_dir):
        if int(path.name.partition("-")[2]) > after:
            names = (output_dir / f"abandoned-{path.name}{f'.{again}' if again else ''}" for again in itertools.count())
            renamed.append(path.rename(next(name for name in names if not name.exists())))
    return renamed


def _not_whole(folder: Path, reason: str) -> UserError:
    others = [path.name for path in whole_checkpoints(folder.parent) if path.name != folder.name]
    hint = f"others there: {', '.join(others)}" if others else "there is no other beside it"
    return UserError("resume_from_checkpoint", folder, f"is not a whole checkpoint: {reason}", hint)


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


_METADATA_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"Path", "PosixPath", "WindowsPath"},
}


class _Unpickler(pickle.Unpickler):
    """DCP's metadata is a pickle: only the plain classes it consists of may be named in it."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("pathlib._local", "pathlib")  # as Python 3.13 calls it
        if name in _METADATA_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"names {module}.{name}, which no checkpoint needs")


def _read_metadata(folder: Path) -> Metadata:
    """What .metadata says. Raises UserError for anything else, of which nothing is run."""
    try:
        metadata = _Unpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
    except Exception as error:  # unpickling what is not a pickle raises nearly everything
        raise _not_whole(folder, f".metadata: {error}") from error
    if not isinstance(metadata, Metadata):
        raise _not_whole(folder, ".metadata holds something else")
    return metadata


class _Reader(dcp.FileSystemReader):
    """torch's reader with the restricted unpickler; tensors are read with weights_only already."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
