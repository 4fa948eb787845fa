"""What is kept of a run: the state that a checkpoint remembers, the model that is handed out, older checkpoints."""

from pathlib import Path
from typing import Any

import torch

from tessera.checkpoint import folder as checkpoints
from tessera.checkpoint.state import POSITIONS, RunState, Source
from tessera.core import terminal
from tessera.core.axes import AXES
from tessera.core.collectives import gathered, largest
from tessera.core.writing import NotWritten
from tessera.data.stream_loader import StreamLoader
from tessera.models.hub import export
from tessera.nn.parameter import to_local
from tessera.train.build import Built


def run_state(built: Built) -> RunState:
    """What a checkpoint after the steps done so far remembers."""
    progress, config = built.progress, built.run.config
    return RunState(
        progress.step,
        progress.tokens,
        built.loader.samples_before(progress.step),
        progress.skipped,
        _source(built),
        built.course(),
        config.model_dump(mode="json"),
        optimizer=not config.save_only_model,
        best=progress.best,
        seed=config.seed,
        order=built.loader.order,
        unit=built.loader.unit,
        stream=built.loader.place(progress.step) if isinstance(built.loader, StreamLoader) else None,
    )


def hand_out(built: Built, dtype: str, into: Path | None = None) -> str:
    """Write the model in `dtype` into a Hugging Face folder (unset: output_dir). Every rank calls it.

    Returns, on each of them, why it could not be written; nothing where it was.
    """
    source, failed = _source(built), ""
    tokenizer = Path(source.tokenizer) if source.tokenizer else None
    folder, into = Path(source.folder), into or built.output
    try:
        export(
            built.model, into, folder, getattr(torch, dtype), tokenizer=tokenizer, config_changes=source.config_changes
        )
    except NotWritten as error:
        failed = str(error)
    return next(filter(None, gathered(failed, built.mesh.world)), "")


@torch.no_grad()
def dtype_out(built: Built) -> str:
    """The dtype that the model is handed out in: save_dtype, but float32 for weights too large for float16.

    Every rank calls it.
    """
    asked = built.run.save_dtype
    if asked != "float16":
        return asked
    own = [to_local(p).abs().max().float() for p in built.model.parameters() if to_local(p).numel()]
    found = torch.stack(own).max() if own else torch.zeros(())
    most = largest(found.to(built.mesh.device), built.mesh.group(AXES)).item()
    return asked if most <= torch.finfo(torch.float16).max else "float32"


def _source(built: Built) -> Source:
    """What goes beside the weights; whole paths, as the checkpoint may be read from another folder."""
    manifest, tokenizer = built.prepared.manifest, built.prepared.tokenizer_folder
    changes: dict[str, Any] = {"eos_token_id": manifest.end_tokens} if manifest.end_tokens else {}
    if built.run.longer_than_known:
        changes[POSITIONS] = built.run.config.sequence_len
    return Source(str(built.run.folder.resolve()), str(tokenizer.resolve()) if tokenizer else None, changes)


def set_aside(built: Built) -> None:
    """Give checkpoints that this run does not continue (it began anew, or further back) another name."""
    terminal.say(*checkpoints.set_aside(built.output, built.run.resume, built.progress.step))
