"""Reads the tensors of a checkpoint: torch's reader, with our own reading of what a checkpoint says of itself."""

import itertools
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem

from tessera.checkpoint.folder import read_checkpoint
from tessera.core.errors import UserError
from tessera.core.files import in_words, open_file


class Reader(dcp.FileSystemReader):
    """Reads from one checkpoint, of which state and metadata are read and checked once. Raises as `read_checkpoint`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self.state, self.metadata = read_checkpoint(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the constructor has read, for DCP."""
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """Copy the parts that `plan` asks for. ValueError, naming the tensor: a part is not what .metadata says."""

        def place(item: ReadItem) -> tuple[str, int]:
            info = self.storage_data[item.storage_index]
            return info.relative_path, info.offset

        for name, items in itertools.groupby(sorted(plan.items, key=place), key=lambda item: place(item)[0]):
            with open_file(self.folder / name, name) as file:
                for item in items:
                    part = self._part(file, item)
                    wanted = [slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True)]
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(part[tuple(wanted)])
                    planner.commit_tensor(item, target)
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done

    def _part(self, file: BinaryIO, item: ReadItem) -> Tensor:
        index = item.storage_index
        info: _StorageInfo = self.storage_data[index]
        entry: Any = self.metadata.state_dict_metadata[index.fqn]
        size = next(chunk.sizes for chunk in entry.chunks if chunk.offsets == index.offset)
        where = f"{index.fqn}: its part at {list(index.offset or ())} in {info.relative_path}"
        try:
            part = torch.load(self._slice_file(file, info), map_location="cpu", weights_only=True)
        except Exception as error:  # bytes that are no tensor raise nearly everything
            raise ValueError(f"{where} cannot be read: {first_line(error)}") from error
        if not isinstance(part, Tensor) or part.layout != torch.strided or part.is_meta:
            raise ValueError(f"{where} is no tensor")
        if part.shape != size or part.dtype != entry.properties.dtype:
            found = f"{part.dtype} of size {list(part.shape)}"
            raise ValueError(f"{where} is {found}, not {entry.properties.dtype} of size {list(size)}")
        return part


def read_into(reader: Reader, tensors: dict[str, Tensor]) -> None:
    """Fill these tensors from a checkpoint; collective where there are several ranks. UserError: it cannot be read."""
    try:
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (CheckpointException, ValueError, KeyError, OSError, RuntimeError) as error:
        raise UserError("resume_from_checkpoint", reader.folder, f"cannot be read: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """In one line what went wrong, on which rank where DCP has gathered it from several."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    causes = {rank: e[0] if isinstance(e, tuple) else e for rank, e in sorted(failures.items())}
    several = dist.is_initialized()
    told = "; ".join(f"rank {rank}: {first_line(e)}" if several else first_line(e) for rank, e in causes.items())
    return told or first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; a UserError's value and reason."""
    if isinstance(error, UserError):
        return f"{error.value}: {error.reason}"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename}: {in_words(error)}" if error.filename else in_words(error)
    return (str(error) or type(error).__name__).partition("\n")[0][:500]
