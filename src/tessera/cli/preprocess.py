"""`tessera preprocess CONFIG`: the data of a run, prepared before it; with --debug some rows, token by token."""

from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from tessera.checkpoint.lock import RunLock
from tessera.checkpoint.sweep import sweep
from tessera.config.load import load_config
from tessera.core import terminal
from tessera.core.errors import UserError, cut_short
from tessera.data.auto_tokenizer import has_tokenizer
from tessera.data.prepare import Prepared
from tessera.data.samples import IGNORED, open_samples
from tessera.data.tokenizer import load_tokenizer
from tessera.models.hub import resolve_model_folder
from tessera.train.output import check_output
from tessera.train.run import model_of, prepared


def preprocess(config_path: Path, overrides: Sequence[str], examples: int) -> None:
    """Prepare the data of the config, and show so many rows of them. Raises UserError."""
    config, notes = load_config(config_path, overrides)
    terminal.say(*notes)
    if config.streaming:
        reason = "a stream is tokenized while the run goes: there is nothing to prepare"
        raise UserError(
            "streaming", True, reason, "tessera train trains on it; streaming: false prepares the same data"
        )
    output = Path(config.output_dir)
    check_output(output)
    folder = resolve_model_folder(config.base_model, weights=False)
    model = model_of(config, folder)
    with RunLock() as lock:
        if config.dataset_prepared_path is None:
            lock.take(output)  # a run that trains there reads what would be replaced
            terminal.say(*sweep(output))
        found = prepared(config, folder, model)
    terminal.say(f"the rows are in {found.folder}")
    if examples:
        show(found, examples, folder)


def show(found: Prepared, examples: int, folder: Path) -> None:
    """Print the first rows to train on: each token as text(label, id), green where it is learnt and red where not.

    `folder`: that of the model, whose tokenizer is taken where the rows came tokenized; without one, ids stand alone.
    """
    place = found.tokenizer_folder or folder
    backend = load_tokenizer(place, "tokenizer").backend if has_tokenizer(place) else None
    rows, console = open_samples(found.folder, "train"), terminal.console(soft_wrap=True)
    terminal.say("", f"text({IGNORED}, id): read only; text(id, id): learnt")
    for index in range(min(examples, len(rows))):
        tokens, labels = (array.tolist() for array in rows[index])
        line = Text(end="\n\n")
        line.append(f"row {index} of {len(rows):,}, {len(tokens):,} tokens: ", "bold")
        for token, label in zip(tokens, labels, strict=True):
            text = backend.decode([token], skip_special_tokens=False) if backend else ""
            shown = cut_short(text).replace("\n", "\\n")
            line.append(f"{shown}({label}, {token})", "red" if label == IGNORED else "green")
            line.append(" ")
        console.print(line)
