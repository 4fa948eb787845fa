"""Saves checkpoints beside the training: tensors are copied before they change, and written while training goes on.

    main thread                         background threads of each rank
    wait for the save in flight
    next forward and backward           copy tensors to host buffers
    optimizer step, train on            plan (own gloo group); rank 0 makes .checkpoint-N.part
                                        write own shards, sync, hash
                                        rank 0: state.json, SHA256SUMS, rename, LATEST, rotation

All that rank 0 does for the others happens inside DCP's own agreement, which tells an error on one rank to every rank:
none waits for a rank whose disk is full.
"""

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from tessera.checkpoint.folder import discard_parts, latest, publish, rotate, seal, sums_of
from tessera.checkpoint.reader import reason_of
from tessera.checkpoint.state import RunState
from tessera.checkpoint.tensors import alone_is_fine, model_tensors, optimizer_tensors
from tessera.core.errors import RunFailed
from tessera.core.exhausted import memory_in_words, ran_out
from tessera.core.files import free_name, remove
from tessera.core.text import human
from tessera.core.writing import writing
from tessera.models.decoder import Decoder
from tessera.nn.parameter import to_local


class Saver:
    """Saves of one run, one in flight at a time. Every rank makes the same calls in the same order.

    A save that fails leaves the checkpoints before it as they were, and is told through `say` on rank 0; a checkpoint
    that is whole through `saved`. Both may be called in a thread beside the training. `failure` is what went wrong in
    the last save, the same on every rank; None when it went well. `check` raises where the run may not write any more.
    `close` at the end in any case.
    """

    def __init__(
        self,
        output_dir: Path,
        keep: int | None,
        *,
        asynchronous: bool,
        timeout: timedelta,
        say: Callable[[str], None],
        saved: Callable[[Path], None] = lambda path: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.output_dir, self.keep, self.asynchronous = output_dir, keep, asynchronous
        self.timeout, self.say, self.saved, self.check = timeout, say, saved, check
        self.failure: str | None = None
        self._told: set[str] = set()
        self.together = dist.is_initialized()
        self.first = not self.together or dist.get_rank() == 0
        self._group: dist.ProcessGroup | None = None
        self._copies = HostCopies()
        self._hook: RemovableHandle | None = None
        self._settled = threading.Event()
        self._settled.set()

    def save(self, model: Decoder, optimizer: torch.optim.Optimizer, state: RunState, *, last: bool = False) -> Path:
        """Begin to write `checkpoint-{state.step}` and return that path; when not asynchronous, finish it too.

        The `last` save of a run is never asynchronous: nothing trains beside it, so it needs no copy of the tensors.
        """
        self.wait()
        beside = self.asynchronous and not last
        if self.together and self._group is None:
            # collectives of training may run at the same time on its groups
            self._group = dist.new_group(backend="gloo", timeout=self.timeout)
        if beside and self._hook is None:
            self._hook = optimizer.register_step_pre_hook(lambda *_: self._copies.wait())
        final = self.output_dir / f"checkpoint-{state.step}"
        tensors = model_tensors(model) | (optimizer_tensors(model, optimizer) if state.optimizer else {})
        writer = Writer(final, state, self.keep, self._copies if beside else None, self.check)
        how: dict[str, Any] = {"storage_writer": writer, "process_group": self._group, "no_dist": not self.together}
        self._settled.clear()
        try:
            (self._begin if beside else self._do)(writer, tensors, how)
        except BaseException:  # host memory ran out, say: nothing is in flight that `close` could wait for
            self._settled.set()
            raise
        return final

    def _begin(self, writer: "Writer", tensors: dict[str, Tensor], how: dict[str, Any]) -> None:
        if not self.together:  # the filter of `alone_is_fine` would end before the other thread does
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
        try:
            response = dcp.async_save(tensors, async_stager=self._copies, **how)
        finally:
            self._copies.begin()
        assert isinstance(response, AsyncSaveResponse)
        response.upload_completion.add_done_callback(lambda done: self._settle(writer, done.exception()))

    def _do(self, writer: "Writer", tensors: dict[str, Tensor], how: dict[str, Any]) -> None:
        error: BaseException | None = None
        try:
            with alone_is_fine():
                dcp.save(tensors, **how)
        except (Exception, CheckpointException) as raised:  # the latter is not among the former
            error = raised
        self._settle(writer, error)

    def _settle(self, writer: "Writer", error: BaseException | None) -> None:
        """In the background, once every rank knows how the save has ended."""
        try:
            self.failure = None
            if error is not None:
                if self.first and self._may_write():
                    remove(writer.part)
                last = latest(self.output_dir)
                kept = f"the last whole checkpoint is {last}" if last else "there is no whole checkpoint"
                self.failure = f"{writer.final.name} was not saved: {reason_of(error)}; {kept}"
            for told in [self.failure, *writer.problems] if self.first else []:
                if told and told not in self._told:  # what stays in the way is no news at the next save
                    self._told.add(told)
                    self.say(told)
            if self.first and self.failure is None:
                self.saved(writer.final)
        finally:
            self._settled.set()

    def _may_write(self) -> bool:
        """Whether the folder is still this run's: another that has taken over may write a folder of the same name."""
        try:
            self.check()
        except RunFailed:
            return False
        return True

    @property
    def settled(self) -> bool:
        """Whether no save is in flight."""
        return self._settled.is_set()

    def wait(self) -> None:
        """Until no save is in flight."""
        self._settled.wait()

    def newest(self) -> Path | None:
        """The newest whole checkpoint, once no save is in flight."""
        self.wait()
        return latest(self.output_dir)

    def close(self) -> None:
        """Wait for the save in flight and free what saves have used."""
        self.wait()
        self._copies.close()
        if self._hook is not None:
            self._hook.remove()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None


class HostCopies(AsyncStager):
    """Copies of this rank's shards in host memory, in buffers that are used again by the next save.

    Fresh buffers would cost a page fault for every 4 KiB of each save; for a GPU's tensors they are pinned, too. The
    copying has a thread of its own: forward and backward only read parameters, so that `wait` before the optimizer's
    step is early enough.
    """

    _synchronize_after_execute = False

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint-copy")
        self._copied: Future[dict[str, Tensor]] | None = None
        self._may_begin = threading.Event()
        self.error: Exception | None = None

    def stage(self, state_dict: dict[str, Tensor]) -> Any:
        """A future of the same tensors with other storage. The copying waits for `begin`."""
        self._may_begin.clear()
        stream = None
        if any(to_local(tensor).is_cuda for tensor in state_dict.values()):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())  # for the last step
        self._copied = self._thread.submit(self._stage, state_dict, stream)
        return self._copied

    def begin(self) -> None:
        """Copy, now that the thread that writes is there: Python waits for ever for one that finds no memory."""
        self._may_begin.set()

    @torch.no_grad()
    def _stage(self, tensors: dict[str, Tensor], stream: torch.cuda.Stream | None) -> dict[str, Tensor]:
        self.error = None
        self._may_begin.wait()
        try:
            with torch.cuda.stream(stream):  # nothing without one
                staged = {name: self._copy(name, tensor) for name, tensor in tensors.items()}
            if stream is not None:
                stream.synchronize()
        except (RuntimeError, MemoryError) as error:  # no host memory: told where all ranks listen, or they would wait
            self.error, staged = error, tensors
            if ran_out(error):
                copies = human(sum(to_local(tensor).nbytes for tensor in tensors.values()))
                told = f"{memory_in_words(error)}, for copies of {copies}; save_async: false needs none"
                self.error = RunFailed(told)
        return staged

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        shard = to_local(tensor)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != shard.shape or buffer.dtype != shard.dtype:
            buffer = torch.empty(shard.shape, dtype=shard.dtype, pin_memory=shard.is_cuda)
            self._buffers[name] = buffer
        buffer.copy_(shard, non_blocking=True)
        return DTensor(buffer, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else buffer

    def wait(self) -> None:
        """Until the originals may change."""
        if self._copied is not None:
            wait([self._copied])  # an error in it is told by the save

    def synchronize_staging(self) -> None:
        self.wait()

    def close(self) -> None:
        self._thread.shutdown()
        self._buffers.clear()


@dataclass
class _Place(_StoragePrefix):
    """Where a rank writes, as rank 0 tells it: the folder's name, and what its files' names begin with."""

    folder: str


class Writer(dcp.FileSystemWriter):
    """Writes one checkpoint: each rank its files and their sums, rank 0 the rest."""

    def __init__(
        self,
        final: Path,
        state: RunState,
        keep: int | None,
        copies: "HostCopies | None" = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.final, self.state, self.keep, self.copies, self.check = final, state, keep, copies, check
        self.part = final.with_name(f".{final.name}.part")
        self.problems: list[str] = []
        super().__init__(self.part, sync_files=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if self.copies is not None and self.copies.error is not None:  # here every rank learns of it
            raise self.copies.error
        return plan  # rank 0 makes the folder, when it has removed what a killed run left

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        with writing(self.part):
            self.make_room()
            self._write_to(free_name(self.part).name)  # something there may not be removable
            self.part.mkdir(parents=True)
        plans = super().prepare_global_plan(plans)
        return [replace(p, storage_data=_Place(p.storage_data.prefix, self.part.name)) for p in plans]

    def _write_to(self, name: str) -> None:
        self.part = self.path = self.final.with_name(name)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        self._write_to(plan.storage_data.folder)
        needs = sum(item.tensor_storage_size() or 0 for item in plan.items)
        with writing(self.part, needs):  # on this rank: DCP's agreement loses what caused an error
            written = super().write_data(plan, planner).value()
            names = sorted(path.name for path in self.part.glob(f"{plan.storage_data.prefix}*"))
            sums = sums_of(self.part, names)
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result((written, sums))
        return future

    def finish(self, metadata: Metadata, results: list[Any]) -> None:
        with writing(self.part):
            super().finish(metadata, [written for written, _ in results])
            seal(self.part, self.state, {name: digest for _, sums in results for name, digest in sums.items()})
            self.put_in_place()

    def make_room(self) -> None:
        """Remove what saves that failed or were killed have left."""
        self.check()
        self.problems += discard_parts(self.final.parent)

    def put_in_place(self) -> None:
        """Make the sealed folder the run's latest checkpoint."""
        self.check()
        self.problems += publish(self.part, self.final)
        best = self.state.best.checkpoint if self.state.best else None
        kept = None if best is None else self.final.with_name(f"checkpoint-{best}")
        self.problems += rotate(self.final.parent, self.final, self.keep, kept)
