"""The end of a run that fails while it goes: an error of the system, or of an allocator, told without a traceback."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tessera.checkpoint.folder import latest
from tessera.core.errors import RunFailed, UserError
from tessera.core.exhausted import memory_in_words, ran_out
from tessera.core.writing import why
from tessera.train.less_memory import less_memory
from tessera.train.run import Run
from tessera.train.settings import compute_dtype
from tessera.train.where import Where


@contextmanager
def failing_in_words(run: Run, device: torch.device) -> Iterator[Where]:
    """Turn what runs out here, and files that fail, into RunFailed with rank, step, phase and newest checkpoint."""
    where = Where()
    try:
        yield where
    except (RunFailed, UserError):
        raise
    except Exception as error:
        rank = os.environ.get("RANK", "0")
        if ran_out(error):
            lines = [f"rank {rank}, {where}: {memory_in_words(error, device)}"]
            more = advice(run, device, copies=where.phase == "save")
        elif isinstance(error, OSError) and error.errno is not None:
            lines, more = [f"rank {rank}, {where}: {why(error, Path(run.config.output_dir))}"], []
        else:
            raise
        kept = latest(Path(run.config.output_dir))
        newest = f"  the newest whole checkpoint is {kept}" if kept else "  there is no whole checkpoint (save_steps)"
        raise RunFailed("\n".join([*lines, newest, *more])) from None
    finally:
        where.close()


def advice(run: Run, device: torch.device, *, copies: bool) -> list[str]:
    """The keys that lower the peak most; `copies`: those of a save lie in the memory that ran out."""
    return less_memory(run.config, run.model, compute_dtype(run.config, device), copies=copies)
