"""The folder that every case begins with a copy of: a model, data, a finished run with checkpoints; made once.

model/ shards/            a model folder in one file and in several      base/    its config.json alone
book.txt lines.jsonl alpaca.jsonl rows.jsonl      one file of each kind of data
out/                      a run of two steps, each saved                 tmp/ home/   TMPDIR and HOME
run.yaml                  three steps in a new folder                    more.yaml    out/ continued to three
"""

import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fuzz.subject import RANKS, Seen, run

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
    "initializer_range": 0.1,
}
SETTINGS: dict[str, Any] = {
    "base_model": "./model",
    "datasets": [{"path": "./book.txt"}],
    "output_dir": "./new",
    "sequence_len": 16,
    "micro_batch_size": 2,
    "max_steps": 3,
    "save_steps": 1,
    "learning_rate": 0.01,
    "lr_scheduler": "constant",
    "bf16": False,
    "auto_resume_from_checkpoints": True,
}
LINE = "north wind and river stone lamp. The sea door reads slow; king seven maps, naïve café."
VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody listens: as a machine without network
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


@dataclass(frozen=True)
class World:
    """The `folder` to copy to `place`, where it was made, and what the run of run.yaml leaves there.

    `weights` is the sum of its model, `names` its files, `operations` what it does to files.
    """

    folder: Path
    place: Path
    weights: str
    names: frozenset[str]
    operations: int


def command(*words: str) -> Callable[[], None]:
    """`tessera words...` as a target."""

    def target() -> None:
        from tessera.cli.main import main

        sys.argv = ["tessera", *words]
        main()

    return target


def instead_of_ranks() -> None:
    """From now on in this process: who would start ranks, or another launcher, only says so."""

    def run_workers(args: Any, processes: int, *how: Any, **also: Any) -> None:
        print(f"{RANKS}{processes}", flush=True)

    def run_foreign(options: Any, here: int, words: Any) -> None:
        print(f"{RANKS}{here}", flush=True)

    for name, module in list(sys.modules.items()):
        for own in (run_workers, run_foreign):
            if name.startswith("tessera.") and hasattr(module, own.__name__):
                setattr(module, own.__name__, own)


def make_world(folder: Path) -> World:
    """Make it with the trainer itself."""
    os.environ.update(VARIABLES)
    os.environ["MPLCONFIGDIR"] = str(folder / "matplotlib")
    here = folder / "cases/one/here"  # so deep that ../.. of a hostile path leads nowhere that matters
    for name in ("base", "tmp", "home"):
        (here / name).mkdir(parents=True)
    (here / "base/config.json").write_text(json.dumps(CONFIG))
    _write_data(here)
    trained: dict[str, Any] = {
        "base_model": "./base",
        "random_init": True,
        "tokenizer": {"train": "bpe", "vocab_size": 290},
    }
    write_yaml(here / "run.yaml", SETTINGS | trained | {"output_dir": "./made", "max_steps": 1, "save_steps": None})
    _well(run(command("train", "run.yaml"), here))
    (here / "model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.move(here / "made" / name, here / "model" / name)
    shutil.rmtree(here / "made")
    generation = {"eos_token_id": 0, "bos_token_id": 0}
    (here / "model/generation_config.json").write_text(json.dumps(generation))
    write_yaml(here / "run.yaml", SETTINGS)
    write_yaml(here / "more.yaml", SETTINGS | {"output_dir": "./out"})
    whole = run(command("train", "run.yaml"), here)
    _well(whole)
    weights, names = digest(here / "new/model.safetensors"), names_in(here / "new")
    shutil.rmtree(here / "new")
    _well(run(command("train", "more.yaml", "--max-steps", "2"), here))
    _well(run(command("convert", "out/checkpoint-2", "shards", "--max-shard-size", "8KB"), here))
    shutil.rmtree(here / "tmp")
    (here / "tmp").mkdir()
    here.rename(folder / "world")
    return World(folder / "world", here, weights, names, whole.operations)


def _write_data(here: Path) -> None:
    line = LINE
    (here / "book.txt").write_text(f"{line}\n" * 12)
    rows: dict[str, list[dict[str, Any]]] = {
        "lines": [{"text": f"{line} {i}"} for i in range(8)],
        "alpaca": [{"instruction": f"Say {i}", "input": line[:9], "output": line[:20]} for i in range(8)],
        "rows": [{"input_ids": [(7 * i + k) % 290 for k in range(12)]} for i in range(8)],
    }
    for name, content in rows.items():
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def write_yaml(file: Path, settings: dict[str, Any]) -> None:
    file.write_text(yaml.safe_dump(settings, sort_keys=False))


def _well(seen: Seen) -> None:
    assert seen.code == 0, seen.said


# ---- What lies in a folder


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "none"


def names_in(folder: Path) -> frozenset[str]:
    """Every name below, folders too."""
    return frozenset(str(path.relative_to(folder)) for path in folder.rglob("*"))


def snapshot(folder: Path, without: tuple[str, ...] = ("home", "tmp")) -> dict[str, str]:
    """Every entry below `folder` with what it is: a digest, a link's target, a kind."""
    found: dict[str, str] = {}
    pending = [entry for entry in os.scandir(folder) if entry.name not in without]
    while pending:
        entry = pending.pop()
        mode = entry.stat(follow_symlinks=False).st_mode
        name = os.path.relpath(entry.path, folder)
        if stat.S_ISLNK(mode):
            found[name] = f"-> {os.readlink(entry.path)}"
        elif stat.S_ISDIR(mode):
            found[name] = "folder"
            pending += os.scandir(entry.path)
        else:
            found[name] = digest(Path(entry.path)) if stat.S_ISREG(mode) else "special"
    return found


def changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """In words, what is not as before."""
    gone = [f"lost {name}" for name in before.keys() - after.keys()]
    new = [f"written {name}" for name in after.keys() - before.keys()]
    other = [f"altered {name}" for name in before.keys() & after.keys() if before[name] != after[name]]
    return sorted(gone + new + other)
