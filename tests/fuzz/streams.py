"""Cases of streams: their keys, and files that are broken, slow or gone further on than a run looks at first."""

import gzip
import json
import signal
import time
from collections.abc import Callable
from typing import Any

from fuzz import hostile
from fuzz.case import Case, group
from fuzz.containers import SHORT, content_of
from fuzz.folders import put_odd_file
from fuzz.subject import Fault
from fuzz.world import LINE, command, write_yaml

SOURCE = {"path": "./lines.jsonl"}
STREAM: dict[str, Any] = {key: value for key, value in SHORT.items() if key != "datasets"} | {
    "pretraining_dataset": [SOURCE],
    "max_steps": 2,
    "dataloader_num_workers": 0,
}
LONGER = {"max_steps": 8}
"""Steps that read further than the eight lines, though three steps are read ahead."""
ENTRIES: list[Any] = [
    "lines.jsonl", SOURCE, [SOURCE, "book.txt"], [[SOURCE]], [{}], "", {"path": None}, 3, [SOURCE, 3], "no/such",
    "owner/name", {"path": ["lines.jsonl"]}, True,
]  # fmt: skip
KEYS: dict[str, tuple[Any, ...]] = {
    "max_steps": (0, -1, 1, 10**12, "all"),
    "dataloader_num_workers": (-1, 65, 10**9, "two"),
    "dataloader_prefetch_factor": (0, -1, 1001, 1, 0.5),
    "streaming": (False, "yes", 3),
    "num_epochs": (1, 0.5),
    "sequence_len": (2, 10**9),
    "sample_packing": (True, False),
    "eval_steps": (1, 0.5),
    "save_strategy": ("epoch", "best"),
    "saves_per_epoch": (2,),
    "auto_resume_from_checkpoints": (False,),
    "test_datasets": ([SOURCE], [{"path": "./alpaca.jsonl"}]),
    "dataset_prepared_path": ("./shared", "./book.txt"),
    "pretrain_multipack_buffer_size": (10_000,),
    "shuffle": (True, False),
}
OF_ENTRY = ("text_column", "field", "skip", "split", "shards", "shards_idx", "name", "type", "ds_type", "data_files")
REFUSED: dict[str, dict[str, Any]] = {
    "no steps": {"max_steps": None},
    "no steps, epochs": {"max_steps": None, "num_epochs": 1},
    "rows held out": {"val_set_size": 0.1},
    "a trained tokenizer": {"tokenizer": {"train": "bpe", "vocab_size": 280}},
    "two sources": {"datasets": ["./book.txt"]},
    "rows of chats": {"pretraining_dataset": "./alpaca.jsonl"},
    "nothing to prepare": {},
}


@group(5)
def stream_keys(case: Case) -> None:
    """What does not go with a stream is refused; its keys, and those of its sources, with values of every kind."""
    case.kind, settings = 26, dict(STREAM)
    form = case.cycle(*REFUSED, "keys", "source", "an entry")
    if form in REFUSED:
        settings |= REFUSED[form]
    elif form == "keys":
        for key in case.dice.sample(list(KEYS), case.pick(1, 2)):
            settings[key] = case.pick(*KEYS[key]) if case.dice.random() < 0.8 else hostile.value(case.dice)
    elif form == "source":
        settings["pretraining_dataset"] = case.pick(*ENTRIES)
    else:
        settings["pretraining_dataset"] = [SOURCE | {case.pick(*OF_ENTRY): hostile.value(case.dice)}]
    if "datasets" not in settings and case.dice.random() < 0.3:  # the same by the key of ours
        settings |= {"datasets": settings.pop("pretraining_dataset"), "streaming": settings.get("streaming", True)}
    own = {key: value for key, value in settings.items() if STREAM.get(key) != value}
    case.what = f"{form} {own!r:.200}"
    case.outputs.add("shared")
    write_yaml(case.here / "run.yaml", settings)
    name = "preprocess" if form == "nothing to prepare" else "train"
    case.tessera(name, "run.yaml", codes=(2,) if form in REFUSED else (0, 1, 2))


@group(4)
def stream_files(case: Case) -> None:
    """Files of a stream that are no files, or are damaged, behind their first row too; read by a worker at times."""
    case.kind, file = 26, case.here / "lines.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    at, form = case.pick(0, 2, 5), case.cycle("line", "bytes", "odd", "packed", "blank", "folder", "other rows")
    settings: dict[str, Any] = STREAM | LONGER
    path = "./lines.jsonl"
    if form == "line":
        lines[at] = case.pick(hostile.json_text(case.dice), b'{"text": 3}', b'{"other": "a"}', b"[]") + b"\n"
        file.write_bytes(b"".join(lines))
    elif form == "bytes":
        path = case.pick(path, "./book.txt")
        target = case.here / path
        content = target.read_bytes()
        place = case.dice.randrange(len(content) // 2, len(content))
        target.write_bytes(content[:place] + case.pick(b"\xff\xfe", b"\0", b"\xed\xa0\x80") + content[place:])
    elif form == "odd":
        put_odd_file(case, file)
    elif form == "packed":
        packed, path = gzip.compress(b"".join(lines * 40)), "./more.jsonl.gz"
        (case.here / path).write_bytes(hostile.garbled(packed, case.dice))
    elif form == "blank":
        blank = case.pick("", " \n", "\ufeff")
        file.write_text("".join(json.dumps({"text": blank}) + "\n" for _ in lines))
    else:
        path, folder = "./data", case.here / "data"
        folder.mkdir()
        (folder / "a.jsonl").write_bytes(b"".join(lines))
        (folder / "b.jsonl").write_bytes(content_of(case, ".jsonl") if form == "other rows" else b"")
    case.what += f"{form}, line {at}, {path}"
    if case.turn % 7 == 0:
        settings["dataloader_num_workers"] = 1
    write_yaml(case.here / "run.yaml", settings | {"pretraining_dataset": path})
    case.tessera("train", "run.yaml", codes=(0, 1, 2))


@group(1)
def stream_sources(case: Case) -> None:
    """A source that is slow, or whose file is taken away, altered or cut while the run goes, and a stop meanwhile."""
    case.kind, form = 26, case.cycle("slow", "gone", "stopped", "cut")
    file = case.here / "lines.jsonl"

    def at(document: int) -> None:
        if form in ("slow", "stopped"):
            time.sleep(0.01)
        elif (case.here / "new/metrics.jsonl").exists():  # after the first step
            if form == "gone":
                file.unlink(missing_ok=True)
            else:
                file.write_text(LINE)

    case.what = form
    case.outputs.add("lines.jsonl")
    write_yaml(case.here / "run.yaml", STREAM | LONGER)
    fault = Fault(step=2 if form == "stopped" else 0, signal=signal.SIGTERM)
    codes = (0,) if form in ("slow", "stopped") else (1,)
    case.call(_watching_documents(at, ["train", "run.yaml"]), f"train, {form}", codes=codes, fault=fault)


def _watching_documents(at: Callable[[int], None], words: list[str]) -> Callable[[], None]:
    """A command in which `at` is called before each document of a stream."""

    def target() -> None:
        from tessera.data import stream

        real = stream._documents

        def documents(file: Any, first: int) -> Any:
            for number, text in enumerate(real(file, first), first):
                at(number)
                yield text

        stream._documents = documents
        command(*words)()

    return target
