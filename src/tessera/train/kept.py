"""What is kept of a run: the state that a checkpoint remembers, the model that is handed out, older checkpoints."""

from pathlib import Path

from tessera.checkpoint import folder as checkpoints
from tessera.checkpoint.state import RunState, Source
from tessera.models.hub import export
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
        seed=config.seed,
    )


def hand_out(built: Built) -> None:
    """Write the model into output_dir as a Hugging Face folder. Every rank calls it."""
    source = _source(built)
    tokenizer = Path(source.tokenizer) if source.tokenizer else None
    folder = Path(source.folder)
    export(built.model, built.output, folder, tokenizer=tokenizer, config_changes=source.config_changes)


def _source(built: Built) -> Source:
    """What goes beside the weights; whole paths, as the checkpoint may be read from another folder."""
    manifest, tokenizer = built.prepared.manifest, built.prepared.tokenizer_folder
    changes = {"eos_token_id": manifest.end_tokens} if manifest.end_tokens else {}
    return Source(str(built.run.folder.resolve()), str(tokenizer.resolve()) if tokenizer else None, changes)


def set_aside(built: Built) -> None:
    """Give checkpoints that this run does not continue (it began anew, or further back) another name."""
    for line in checkpoints.set_aside(built.output, built.run.resume, built.progress.step):
        print(line, flush=True)
