"""Cases of data in containers: arrays, tables, columns and what is compressed; and of every key of an entry."""

import bz2
import csv
import gzip
import io
import json
import lzma
from typing import Any

from fuzz import hostile
from fuzz.case import Case, group
from fuzz.folders import put_odd_file
from fuzz.world import LINE, SETTINGS, write_yaml

SHORT = SETTINGS | {"max_steps": 1, "save_steps": None, "sequence_len": 64}
BOMB = 1 << 28
"""Bytes that a bomb unpacks to: some thousand times as many as it has."""


def train(case: Case, path: Any, more: dict[str, Any] | None = None, **entry: Any) -> Any:
    """One step on an entry of `datasets`, or `tessera preprocess` of it."""
    write_yaml(case.here / "run.yaml", SHORT | {"datasets": [{"path": path, **entry}]} | (more or {}))
    return case.tessera(case.pick("train", "train", "preprocess"), "run.yaml")


def zstd(content: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(content)


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def rows(case: Case) -> list[dict[str, Any]]:
    """Eight rows, of which one may hold what is hostile."""
    made: list[dict[str, Any]] = [{"instruction": f"Say {i}", "input": LINE[:9], "output": LINE[:20]} for i in range(8)]
    if case.dice.random() < 0.3:
        made[case.pick(0, 3, 7)][case.pick("instruction", "input", "output", "new")] = hostile.value(case.dice)
    return made


def columns(case: Case, form: str) -> bytes:
    """A Parquet or Arrow file, whose columns may be nested, of odd types, named twice, or none."""
    import pyarrow
    from pyarrow import ipc, parquet

    texts = [f"{LINE} {i}" for i in range(8)]
    kind = case.pick("plain", "plain", "nested", "odd", "twice", "none", "no rows", "nulls")
    odd: list[Any] = [
        pyarrow.array([b"\xff\0"] * 8), pyarrow.array([float("nan")] * 8),
        pyarrow.array([2**62] * 8, pyarrow.timestamp("ns")),
        pyarrow.array([{"a": [None]}] * 8),
        pyarrow.array([[("a", 1)]] * 8, pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        pyarrow.array(texts).dictionary_encode(), pyarrow.array(texts, pyarrow.large_string()), pyarrow.nulls(8),
    ]  # fmt: skip
    table = pyarrow.table({"text": texts})
    if kind == "nested":
        table = pyarrow.table({"messages": [[{"role": "user", "content": text}] for text in texts]})
    elif kind == "odd":
        table = pyarrow.table({case.pick("text", "input_ids", "messages", "extra"): case.pick(*odd), "other": texts})
    elif kind == "twice":
        table = pyarrow.Table.from_arrays([pyarrow.array(texts)] * 2, names=["text", "text"])
    elif kind == "none":
        table = pyarrow.table({})
    elif kind == "no rows":
        table = table.slice(0, 0)
    elif kind == "nulls":
        table = pyarrow.table({"text": [None, *texts]})
    case.what += f"{kind} columns "
    sink = io.BytesIO()
    if form == ".parquet":
        parquet.write_table(table, sink)
    else:
        opening = case.pick(ipc.new_file, ipc.new_stream)
        with opening(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def content_of(case: Case, form: str) -> bytes:
    """What a well-formed file with this ending holds."""
    if form in (".parquet", ".arrow"):
        return columns(case, form)
    made = rows(case)
    if form == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in made).encode("utf-8", "replace")
    if form == ".json":
        around = case.pick(made, made, {"data": made}, {"version": 1, "train": made}, {"nothing": made}, [made], {}, [])
        return json.dumps(around, indent=case.pick(None, 2)).encode()
    if form == ".txt":
        return f"{LINE}\n".encode() * 12
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if form == ".tsv" else ",")
    names = case.pick(["instruction", "input", "output"], ["a", "a", "b"], ["", "", ""], ["instruction", "output", "x"])
    writer.writerow(names)
    writer.writerows([str(value) for value in list(row.values())[:3]] for row in made)
    return text.getvalue().encode("utf-8", "replace")


def damaged(case: Case, content: bytes) -> bytes:
    """The same, cut, garbled, in another encoding, with NULs, or said twice."""
    form = case.cycle("whole", "cut", "garbled", "encoding", "nul", "twice", "trailing", "empty")
    case.what += f"{form} "
    if form == "cut":
        return content[: case.dice.randrange(len(content) + 1)]
    if form == "garbled":
        return hostile.garbled(content, case.dice)
    if form == "encoding":
        return content.decode("utf-8", "replace").encode(case.pick("utf-16", "utf-8-sig", "cp500", "utf-32"), "replace")
    if form == "nul":
        at = case.dice.randrange(len(content) + 1)
        return content[:at] + b"\0" * case.pick(1, 5000) + content[at:]
    if form in ("twice", "trailing"):
        return content + (content if form == "twice" else case.pick(b"\0", b"x", b"\n{", b" " * 99))
    return b"" if form == "empty" else content


@group(5)
def containers(case: Case) -> None:
    """Files of every container, compressed or not, damaged inside and outside, under right and wrong names."""
    case.kind = 24
    form = case.cycle(".json", ".csv", ".parquet", ".jsonl", ".arrow", ".tsv", ".txt")
    content = content_of(case, form)
    packed = case.pick("", "", *PACK)
    if case.dice.random() < 0.6 or not packed:
        content = damaged(case, content)
    if packed:
        content = PACK[packed](content)
        content = damaged(case, content) if case.dice.random() < 0.5 else content
    if case.dice.random() < 0.2:
        form = case.pick(".json", ".csv", ".parquet", ".jsonl", ".arrow", ".txt", ".zip", "")
    folder = case.here / "data"
    folder.mkdir()
    file = folder / f"train{form}{packed}"
    file.write_bytes(content)
    case.what += f"in {file.name}: {content[:20]!r}"
    entry = case.pick({}, {}, {"ds_type": case.pick("json", "csv", "parquet", "arrow", "text")}, {"type": "alpaca"})
    train(case, case.pick("./data", f"./data/{file.name}"), **entry)


@group(1)
def bombs(case: Case) -> None:
    """Small files that unpack to a thousand times their size: refused, in the memory and the time that others take."""
    case.kind, packed = 24, case.cycle(".gz", ".bz2", ".xz", ".zst")
    form = case.cycle("a", " ", "[", '{"text": "', "\n", "a,", "line")
    block = {"line": f"{LINE}\n".encode()}.get(form, form.encode() if len(form) == 1 else b"a" * 16)
    start = form.encode() if len(form) > 1 and form != "line" else b""
    name = f"bomb{case.pick('.jsonl', '.json', '.txt', '.csv')}{packed}"
    (case.here / name).write_bytes(_packed_bomb(packed, start, block * (2**20 // len(block)), BOMB >> 20))
    case.what = f"{form!r} and so on in {name}, {(case.here / name).stat().st_size:,} bytes"
    train(case, f"./{name}")


def _packed_bomb(packed: str, start: bytes, block: bytes, count: int) -> bytes:
    # any of them may go on in a further stream behind the first, and is made quickly so
    return PACK[packed](start) + PACK[packed](block) * count


@group(4)
def dataset_keys(case: Case) -> None:
    """Every key of an entry with values of every kind, over data of every kind; and test_datasets."""
    from tessera.config.sections.data import DatasetConfig

    case.kind = 17
    names = [name for name in DatasetConfig.model_fields if name != "path"]
    entry: dict[str, Any] = {"path": case.pick("./alpaca.jsonl", "./lines.jsonl", "./rows.jsonl", "./chats.jsonl", ".")}
    write_chats(case)
    for _ in range(case.pick(1, 1, 2)):
        entry[case.pick(*names)] = case.pick(hostile.value(case.dice), case.dice.choice(ENTRY_VALUES))
    more: dict[str, Any] = case.pick({}, {}, {"chat_template": "chatml"}, {"sample_packing": True})
    if case.dice.random() < 0.25:
        more |= {"test_datasets": [entry], "eval_steps": 1}
        case.what = "test_datasets "
    case.what += f"{entry!r:.200}"
    write_yaml(case.here / "run.yaml", SHORT | {"datasets": [entry]} | more)
    if "test_datasets" in more:
        write_yaml(case.here / "run.yaml", SHORT | more)
    case.tessera(case.pick("train", "train", "preprocess"), "run.yaml")


ENTRY_VALUES: list[Any] = [
    "chat_template", "alpaca", "completion", "input_output", "sharegpt", "alpaca:chat", "alpaca:x", ":", "a.b:c",
    ".load",
    "train[:1]", "train[:50%]", "train[-2:]", "train[9:1]", "train[::]", "train[:200%]", "[", "test", "train[1e9:]",
    "*.jsonl", "**/*", "../*", "[", "/dev/*", "a\0b", ["*.jsonl", "book.txt"], {"assistant": ["x"]},
    {"x": ["assistant"]},
    {"role": "from", "content": "value"}, {"content": "role"}, ["assistant", "nobody"], "all", "last", "json", "csv",
    "text",
    {"format": "{instruction}"}, {"field_instruction": "text"},
]  # fmt: skip


def write_chats(case: Case) -> None:
    """chats.jsonl, four chats."""
    turns = [{"role": "user", "content": "north"}, {"role": "assistant", "content": "wind"}]
    (case.here / "chats.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 4)


@group(2)
def prepared_path(case: Case) -> None:
    """Where prepared data go and lie: folders that cannot be, that hold the model or the output, or are damaged."""
    case.kind, form = 5, case.cycle("odd", "text", "within", "damaged", "foreign")
    path: Any = "./shared"
    case.outputs.add("shared")
    if form == "odd":
        (case.here / "shared").touch()
        put_odd_file(case, case.here / "shared")
    elif form == "text":
        path = case.pick(*hostile.TEXTS, "/proc/x", "/sys/x", "/dev/null/x")
    elif form == "within":
        path = case.pick("./model", "./out", "./new", "./new/prepared", ".", "./book.txt", "./out/checkpoint-1")
    case.what += f" dataset_prepared_path {form}: {path!r:.60}"
    if isinstance(path, str):
        case.outputs |= {path.removeprefix("./").split("/")[0]} - {"book.txt"}
    write_yaml(case.here / "run.yaml", SHORT | {"dataset_prepared_path": path})
    free = form in ("within", "text")
    command = case.pick("train", "preprocess")
    seen = case.tessera(command, "run.yaml", free=free)
    if form not in ("damaged", "foreign") or seen.code:
        return
    files = [file for file in sorted((case.here / "shared").rglob("*")) if file.is_file()]
    file = case.pick(*files)
    if form == "damaged":
        file.write_bytes(hostile.garbled(file.read_bytes(), case.dice))
    else:
        put_odd_file(case, file)
    case.what += f" then {file.name}"
    if case.tessera("train", "run.yaml").code not in (0, 2):
        case.wrong("prepared data that are damaged are neither refused nor made anew")


@group(1)
def hub(case: Case) -> None:
    """Names of data sets, and folders made like those of the hub, where no network is."""
    case.kind, form = 19, case.cycle("name", "folder", "model")
    path: Any = case.pick(
        "tatsu-lab/alpaca", "owner/name", "squad", "a" * 90, "a/b/c", "-x/y", "x..y/z", "a--b/c", "x@y/z"
    )
    entry: dict[str, Any] = {
        case.pick("name", "revision", "split", "data_files"): case.pick("x", "..", "train", "é", "/")
    }
    folder = case.here / "set"
    if form == "folder":
        folder.mkdir()
        head = case.pick("- config_name: x\n  data_files: a.jsonl", "x", "[[", "- {data_files: /dev/zero}", "- {}")
        (folder / "README.md").write_text(f"---\nconfigs:\n{head}\n---\n")
        (folder / "set.py").write_text("open('ran', 'w')\n")
        (folder / "a.jsonl").write_bytes((case.here / "lines.jsonl").read_bytes())
        path = "./set"
    case.what = f"{form} {path[:40]} {entry}"
    if form == "model":
        write_yaml(case.here / "run.yaml", SHORT | {"base_model": path, **case.pick({}, {"tokenizer": path})})
        case.tessera("train", "run.yaml")
    else:
        train(case, path, **entry)
    if (case.here / "ran").exists():
        case.wrong("code that lay beside the data was run")


PATTERNS = [
    "*.jsonl", ["a.jsonl", "b.jsonl"], "*", "**/*.jsonl", "../*.jsonl", "no.jsonl", "[", "[!", "a.jsonl/*", "/dev/*",
    "/dev/zero", "\0", ["*.jsonl", "c.csv"], "deep", "." * 5000,
]  # fmt: skip
SLICES = ["train[2:4]", "train[:50%]", "train[-3:]", "train[9:1]", "train[:0]", "train[99%:]", "train[1:2"]


@group(4)
def named_files(case: Case) -> None:
    """Files as an entry names them: patterns, slices, shards, what `datasets` has saved; and names that say nothing."""
    case.kind, folder = 22, case.here / "set"
    folder.mkdir()
    form = case.cycle("pattern", "saved", "slice", "unnamed", "saved splits")
    entry: dict[str, Any] = {}
    if form == "pattern":
        (folder / "deep").mkdir()
        for name in ("a.jsonl", "b.jsonl", "deep/d.jsonl"):
            (folder / name).write_bytes(content_of(case, ".jsonl"))
        (folder / "c.csv").write_bytes(content_of(case, ".csv"))
        entry = {"data_files": case.pick(*PATTERNS)}
    elif form == "slice":
        (folder / "a.jsonl").write_bytes((case.here / "alpaca.jsonl").read_bytes())
        entry = {"split": case.pick(*SLICES)} | case.pick({}, {"shards": 3, "shards_idx": case.pick(0, 2, 3)})
    elif form == "unnamed":
        odd = case.cycle(gzip.compress(LINE.encode()), b"\0" * 99, content_of(case, ".json"), columns(case, ".parquet"))
        (folder / case.pick("part-0", "data.shard", ".hidden", "README")).write_bytes(odd)
        (folder / "part-1").write_bytes(odd)
    else:
        inner = folder if form == "saved" else folder / "train"
        inner.mkdir(exist_ok=True)
        named: Any = case.pick([{"filename": "a.arrow"}], [{"filename": "../../book.txt"}], [3], {}, None)
        (inner / "a.arrow").write_bytes(columns(case, ".arrow"))
        (inner / "state.json").write_text(json.dumps(case.pick({"_data_files": named}, {"_data_files": named}, [], 3)))
        if form == "saved splits":
            splits = case.pick(["train"], ["train"], ["test"], 3)
            (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    case.what += f"{form} {entry!r:.100}"
    train(case, "./set", **entry)
