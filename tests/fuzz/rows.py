"""Cases of data: JSONL of all kinds, names, encodings, what is no data at all."""

import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fuzz import hostile
from fuzz.case import Case, group
from fuzz.chats import FORMATS, write_rows
from fuzz.folders import put_odd_file
from fuzz.world import LINE, SETTINGS, write_yaml

SHORT = SETTINGS | {"max_steps": 1, "save_steps": None}


def _train(case: Case, path: str = "./rows.jsonl", **also: Any) -> Any:
    write_yaml(case.here / "run.yaml", SHORT | {"datasets": [{"path": path, **also}]})
    return case.tessera("train", "run.yaml")


def _manifest(here: Path, output: str = "new") -> dict[str, Any]:
    return json.loads((here / output / "prepared/manifest.json").read_text())


@group(4)
def jsonl(case: Case) -> None:
    """Rows with values of every kind."""
    case.kind, name = 18, case.cycle("rows", "lines", "alpaca")
    file = case.here / f"{name}.jsonl"
    lines = file.read_bytes().splitlines()
    at, form = case.pick(0, 3, 7), case.dice.randrange(7)
    row = json.loads(lines[at])
    key = case.pick(*row, "labels", "attention_mask")
    if form == 0:
        row[key] = hostile.value(case.dice)
        lines[at] = json.dumps(row).encode()
    elif form == 1:
        length = len(row.get("input_ids", [1]))
        odd = [-1, 300, 2**31, 2**63, 2**64, 10**400, 1.5, True, None, "1", [1]]
        row[key] = [
            case.pick(*odd, 3) if case.dice.random() < 0.3 else 1 for _ in range(case.pick(length, length + 1, 0, 2000))
        ]
        lines[at] = json.dumps(row).encode()
    elif form == 2:
        lines[at] = hostile.json_text(case.dice)
    elif form == 3:
        lines[at] = hostile.garbled(lines[at], case.dice)
    elif form == 4:
        separator = case.pick(b"\r", b"\xe2\x80\xa8", b"\n\n\n", b"\x1e", b" ", b",")
        lines = [separator.join(lines)]
    elif form == 5:
        lines = [json.dumps([json.loads(line) for line in lines]).encode()]
    else:
        lines[at] = json.dumps({**row, key: hostile.deep(case.dice, "a", "")}).encode()
    case.what = f"{name} row {at}, {key}, form {form}: {lines[min(at, len(lines) - 1)][:50]!r}"
    file.write_bytes(b"\n".join(lines) + case.pick(b"\n", b""))
    _train(case, f"./{name}.jsonl", **case.pick({}, {}, {"type": "completion"}, {"type": "alpaca"}, {"field": "input"}))


@group(1)
def packed(case: Case) -> None:
    """Rows whose other keys say that they are several documents, or weigh differently."""
    case.kind = 23
    rows = [json.loads(line) for line in (case.here / "rows.jsonl").read_text().splitlines()]
    key, values = case.cycle(
        ("position_ids", [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 7]),
        ("position_ids", [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]),
        ("position_ids", [0] * 12),
        ("segment_ids", [0] * 6 + [1] * 6),
    )
    for row in rows:
        row[key] = values
    case.what = f"{key} {values}"
    (case.here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if _train(case).code == 0:
        case.wrong(f"rows with {key} that are no single document are trained on as one")


@group(2)
def names(case: Case) -> None:
    """JSON rows in files of other names: they are read as rows, or refused; never as raw text."""
    case.kind, kind = 22, case.pick("rows", "lines", "alpaca")
    content = (case.here / f"{kind}.jsonl").read_bytes()
    suffix = case.cycle(
        ".JSONL", ".ndjson", ".jsonlines", ".Jsonl", ".jsonl.txt", ".json", ".jsonl.gz", ".NDJSON", ".data"
    )
    if suffix.endswith("gz"):
        content = gzip.compress(content)
    elif suffix == ".json":
        content = json.dumps([json.loads(line) for line in content.splitlines()]).encode()
    inside = case.pick(True, False)
    folder = case.here / "data"
    folder.mkdir()
    file = folder / f"train{suffix}"
    file.write_bytes(content)
    case.what = f"{kind} in {'a folder with ' if inside else ''}{file.name}"
    if _train(case, "./data" if inside else f"./data/{file.name}").code == 0:
        said = _manifest(case.here)
        if kind == "lines":  # cut into windows; read raw, the names of the keys would be tokens too
            backend = Tokenizer.from_file(str(case.here / "model/tokenizer.json"))
            texts = [json.loads(line)["text"] for line in (case.here / "lines.jsonl").read_text().splitlines()]
            as_rows = said["train_tokens"] <= sum(len(backend.encode(text).ids) + 1 for text in texts)
        elif kind == "alpaca":
            as_rows = said["train_rows"] + said["dull_rows"] + said["dropped_rows"] == 8
        else:
            as_rows = said["tokenizer"] is None
        if not as_rows:
            case.wrong(f"trained on as raw text: {said['train_rows']} rows")


@group(3)
def data_files(case: Case) -> None:
    """Text that is none, encodings, odd names, and what is no file."""
    case.kind, form = 18, case.cycle(*range(7))
    folder = case.here / "data"
    folder.mkdir()
    file, text = folder / "a.txt", LINE * 20
    path = case.pick("./data", "./data/a.txt")
    file.write_text(text)
    if form == 0:
        file.write_bytes(
            text.encode(case.pick("utf-16", "utf-32", "latin-1", "utf-8-sig", "cp500", "utf-7", "shift-jis"), "replace")
        )
    elif form == 1:
        file.write_bytes(
            case.pick(
                b"",
                b" \n",
                b"\0" * 100,
                os.urandom(64),
                b"\xef\xbb\xbf",
                b"a",
                b"\xff" * 2000,
                b"\r\n" * 50,
                b"x" * 200_000,
            )
        )
    elif form == 2:
        put_odd_file(case, file)
    elif form == 3:
        odd = case.pick(b"\xff\xfe.txt", "é\u202e.txt".encode(), b"a\nb.txt", b" ", b"-x", b"[red].txt", b".hidden")
        os.rename(file, os.path.join(os.fsencode(folder), odd))
        if case.dice.random() < 0.5:
            os.symlink("../book.txt", os.path.join(os.fsencode(folder), b"more\xe9.txt"))
        path = "./data"
        case.what = f"a name {odd!r}"
    elif form == 4:
        (folder / "again").symlink_to("../data")
        os.mkfifo(folder / "fifo.txt")
    elif form == 5:
        file.unlink()
    else:
        path = case.pick(
            "/dev/stdin", "/dev/zero", "/dev/null", "/dev/tty", "/proc/self/mem", "", "\0", "a" * 5000, "~nosuchuser"
        )
    case.what += f" {path[:40]!r}, form {form}"
    _train(case, path, **case.pick({}, {}, {"type": "completion"}, {"type": "alpaca"}))


@group(1)
def output_inside(case: Case) -> None:
    """A run that writes into the folder that it reads: it is refused, or reads the same again."""
    case.kind, data = 8, case.here / "data"
    data.mkdir()
    (case.here / "book.txt").rename(data / "book.txt")
    output = case.pick("./data/new", "./data", "./data/deep/new")
    case.outputs.add("data")
    case.what = f"datasets ./data, output_dir {output}"
    write_yaml(case.here / "run.yaml", SETTINGS | {"datasets": [{"path": "./data"}], "output_dir": output})
    if case.tessera("train", "run.yaml").code != 0:
        return
    first = _manifest(case.here, output)["train_tokens"]
    seen = case.tessera("train", "run.yaml", "--set", "auto_resume_from_checkpoints=false")
    if seen.code:
        case.wrong(f"the same run is refused once its own output lies there: {seen.err[:200]}")
    elif (tokens := _manifest(case.here, output)["train_tokens"]) != first:
        case.wrong(f"{first} tokens at first, {tokens} once the run's own output lies there")


def table(kind: str, columns: dict[str, list[Any]]) -> bytes:
    """A Parquet or Arrow file."""
    import pyarrow
    from pyarrow import ipc, parquet

    made, sink = pyarrow.table(columns), io.BytesIO()
    if kind == "parquet":
        parquet.write_table(made, sink)
    else:
        with ipc.new_file(sink, made.schema) as writer:
            writer.write_table(made)
    return sink.getvalue()


@group(7)
def well_formed(case: Case) -> None:
    """What is right, of every family and kind of data, in every mode: trained on, or refused for its sizes alone."""
    case.kind = 16
    file = case.here / "model/config.json"
    content = json.loads(file.read_text())
    turn = case.cycle(
        "alpaca",
        "gpt2",
        "tied",
        "qwen3",
        "misfit",
        "loop",
        "lines",
        "epochs",
        "held out",
        "parquet",
        "arrow",
        "chats",
        "mistral",
    )
    settings: dict[str, Any] = dict(SHORT)
    if turn in ("gpt2", "qwen3", "mistral", "tied"):
        content |= {"model_type": "llama" if turn == "tied" else turn, "tie_word_embeddings": turn == "tied"}
        file.write_text(json.dumps(content))
        settings["random_init"] = turn != "tied"
    elif turn in ("alpaca", "lines"):
        settings |= {"datasets": [{"path": f"./{turn}.jsonl"}], "sequence_len": 512}
    elif turn in ("parquet", "arrow"):
        (case.here / f"table.{turn}").write_bytes(table(turn, {"text": [f"{LINE} {i}" for i in range(8)]}))
        settings["datasets"] = [{"path": f"./table.{turn}"}]
    elif turn == "chats":
        write_rows(case, [FORMATS["learnt parts"][1]] * 6)
        settings |= {"datasets": [{"path": "./made.jsonl"}], "chat_template": "chatml", "sequence_len": 512}
    elif turn == "misfit":
        settings |= {
            "tensor_parallel_size": case.pick(3, 5, 16),
            "tensor_parallel_mode": case.pick("1d", "2d", "2.5d", "3d"),
        }
    elif turn == "loop":
        settings |= {
            "tensor_parallel_size": 2,
            "tensor_parallel_mode": "2d",
            "tensor_parallel_schedule": case.pick("summa", "cannon"),
        }
    elif turn == "epochs":
        settings |= {"max_steps": None, "num_epochs": 0.1, "warmup_ratio": 0.1, "lr_scheduler": "linear"}
    else:
        settings |= {"val_set_size": case.pick(2, 0.2), "eval_steps": 1}
    case.what = turn
    write_yaml(case.here / "run.yaml", settings)
    # a tied model whose files hold both matrices, which differ, is refused; two ranks on a model of two heads are not
    case.tessera("train", "run.yaml", codes=(2,) if turn in ("misfit", "loop", "tied") else (0,))
