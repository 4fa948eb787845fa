"""README.md beside the trained model: what it was made from, how, and how to load it. One that is not a run's stays."""

import hashlib
import os
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from tessera import __version__
from tessera.core.text import counted
from tessera.train.build import Built
from tessera.train.notes import PLOT

_MARK = re.compile(r"^<!-- written by tessera, sha256 ([0-9a-f]{64}) -->\n", re.MULTILINE)
_PASSWORD = re.compile(r"(\b[a-z][a-z+.-]*://)[^/\s@]+@", re.IGNORECASE)
"""Of an address such as https://user:password@host."""


def is_ours(file: Path) -> bool:
    """Whether a run wrote the model card `file` and nobody has changed it since, or there is none."""
    if not os.path.lexists(file):
        return True
    try:
        text = file.read_text("utf-8", "replace")
    except OSError:
        return False
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _sum(_MARK.sub("", text))


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def model_card(built: Built, dtype: str, last: Mapping[str, Any], plotted: bool) -> str:
    """The card of the model that `built` has trained and handed out in `dtype`.

    `last` has loss, eval_loss and eval_ppl of this model, where known, and `best_step` where an earlier step than the
    last has made it; `plotted`: loss.png lies beside it. The YAML has no password that a server's address holds: cards
    are published.
    """
    head = yaml.safe_dump(_metadata(built), sort_keys=False, allow_unicode=True)
    body = "\n\n".join(
        [
            f"# {built.output.resolve().name}",
            _table(built, dtype, last),
            *([f"![loss and eval_loss by optimizer step]({PLOT})"] if plotted else []),
            "## How to load it",
            _fenced(_loading(built), "python"),
            "## The configuration of the run",
            _fenced(_PASSWORD.sub(r"\1…@", yaml.safe_dump(given(built), sort_keys=False, allow_unicode=True)), "yaml"),
        ]
    )
    front, rest = f"---\n{head}---\n", f"\n{body}\n"
    return f"{front}<!-- written by tessera, sha256 {_sum(front + rest)} -->\n{rest}"


def given(built: Built) -> dict[str, Any]:
    """The keys that the user gave, and the sizes that were filled in."""
    return built.run.config.model_dump(mode="json", exclude_unset=True)


def _metadata(built: Built) -> dict[str, Any]:
    """What the hub reads: a base model only where it is one of the hub's."""
    base = built.run.config.base_model
    named = {} if built.run.config.random_init or os.path.isdir(base) else {"base_model": base}
    return {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["tessera"], **named}


def _table(built: Built, dtype: str, last: Mapping[str, Any]) -> str:
    config, manifest, progress = built.run.config, built.prepared.manifest, built.progress
    start = f"`{config.base_model}`" + (", its config.json alone: random weights" if config.random_init else "")
    rows = counted(manifest.train_rows, "row") + f" of at most {manifest.sequence_len} tokens"
    if config.streaming:
        rows = f"a stream, in rows of {manifest.sequence_len} tokens"
    held_out = f", {manifest.eval_rows} more held out" if manifest.eval_rows else ""
    parameters = sum(p.numel() for p in built.model.parameters())
    loss = {key: f"{last[key]:.4g}" for key in ("loss", "eval_loss", "eval_ppl") if last.get(key) is not None}
    lines = {
        "base model": f"{start} ({built.run.model.family}, {parameters:,} parameters)",
        "data": ", ".join(f"`{dataset.path}`" for dataset in config.datasets) + f": {rows}{held_out}",
        "trained for": f"{counted(progress.step, 'step')}, {counted(progress.tokens, 'learnt token')}",
        **loss,
        "weights": dtype + (f", of step {last['best_step']}: the best eval_loss" if "best_step" in last else ""),
        "layout": str(built.mesh) + (f" ({built.mesh.world} processes)" if built.mesh.world > 1 else ""),
        "made with": ", ".join(f"{name} {number}" for name, number in _versions().items()),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in lines.items())])


def _versions() -> dict[str, str]:
    found = {"tessera": __version__}
    for name in ("torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _loading(built: Built) -> str:
    folder = str(built.run.config.output_dir)
    names = "AutoModelForCausalLM" + (", AutoTokenizer" if built.prepared.tokenizer_folder else "")
    lines = [f"from transformers import {names}", ""]
    lines.append(f'model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype="auto")')
    if built.prepared.tokenizer_folder:
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({folder!r})")
    return "\n".join(lines)


def _fenced(text: str, language: str) -> str:
    """`text` as a block of code, whatever backticks it holds."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
