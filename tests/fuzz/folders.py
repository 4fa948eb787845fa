"""Cases of model folders and of data."""

import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz import hostile
from fuzz.case import Case, group
from fuzz.world import SETTINGS, write_yaml


def put_odd_file(case: Case, file: Path) -> None:
    """Something else than a file in the place of one."""
    form = case.cycle(
        "fifo", "folder", "circle", "link to nothing", "missing", "empty", "device", "socket", "unreadable bytes"
    )
    if file.is_dir() and not file.is_symlink():
        return
    file.unlink()
    if form == "fifo":
        os.mkfifo(file)
    elif form == "folder":
        file.mkdir()
    elif form == "circle":
        file.symlink_to(file.name)
    elif form == "link to nothing":
        file.symlink_to("nothing")
    elif form == "empty":
        file.touch()
    elif form == "device":
        file.symlink_to(case.pick("/dev/zero", "/dev/null"))
    elif form == "socket":
        os.mknod(file, 0o140644)
    elif form == "unreadable bytes":
        file.write_bytes(b"\xff\x00" * 50)
    case.what += f"{file.name} is a {form}"


def change_json(file: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


CONFIG_KEYS = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "initializer_range",
    "attention_dropout", "rope_theta", "rope_scaling", "rope_parameters", "model_type", "hidden_act",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "architectures", "eos_token_id", "dtype", "torch_dtype",
    "quantization_config", "partial_rotary_factor", "n_embd", "layer_norm_epsilon",
]  # fmt: skip
ROPES = [
    {"rope_type": "llama3", "factor": 0, "low_freq_factor": 1, "high_freq_factor": 4},
    {"rope_type": "llama3", "factor": 10**400, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "llama3"}, {"rope_type": "yarn", "factor": 2.0}, {"type": "linear"}, {"rope_theta": 0},
    {"rope_theta": 10**400}, {"full_attention": {"rope_type": "default"}},
    {"rope_type": "llama3", "factor": 8, "low_freq_factor": 0, "high_freq_factor": 1e-320},
]  # fmt: skip


@group(5)
def config_json(case: Case) -> None:
    """Every key of config.json with values of every kind, most of all sizes."""
    case.kind, key = 16, case.pick(*CONFIG_KEYS[:10], *CONFIG_KEYS)
    odd: Any = case.dice.choice(hostile.SIZES) if case.dice.random() < 0.6 else hostile.value(case.dice)
    if key in ("rope_scaling", "rope_parameters"):
        odd = case.dice.choice(ROPES)
    if key == "rms_norm_eps":
        odd = case.pick(10**400, 10**18, 1e300, 0, -1, "1e-5")
    if key == "model_type":
        odd = case.pick("gpt2", "qwen3", "mixtral", "", None, 3, "llama")
    family = case.pick("llama", "llama", "qwen3", "gpt2", "qwen2", "mistral")
    change_json(case.here / "model/config.json", lambda content: content.update({"model_type": family, key: odd}))
    case.what = f"{family} {key}: {str(odd)[:40]}"
    settings = SETTINGS | {"random_init": case.dice.random() < 0.6}
    if case.dice.random() < 0.3:
        settings |= {
            "tensor_parallel_size": case.pick(2, 3, 8),
            "tensor_parallel_mode": case.pick("1d", "2d", "2.5d", "3d"),
        }
    write_yaml(case.here / "run.yaml", settings)
    line = case.pick(["train", "run.yaml"], ["inspect", "run.yaml"], ["convert", "model", "target"])
    case.outputs |= {"target"}
    case.tessera(*line)


@group(4)
def json_files(case: Case) -> None:
    """JSON files of a model folder that are none, or nested without end."""
    case.kind = 18
    folder = case.pick("model", "shards")
    names = [file.name for file in (case.here / folder).glob("*.json")]
    file = case.here / folder / case.pick(*names)
    content = (
        hostile.json_text(case.dice) if case.dice.random() < 0.7 else hostile.garbled(file.read_bytes(), case.dice)
    )
    case.what = f"{folder}/{file.name}: {content[:30]!r}"
    file.write_bytes(content)
    _use(case, folder)


@group(3)
def odd_files(case: Case) -> None:
    """A FIFO, a folder, a device in place of any file of a model or its tokenizer, or of the data."""
    case.kind, folder = 18, case.pick("model", "shards")
    files = [*sorted((case.here / folder).iterdir()), case.here / "book.txt"]
    put_odd_file(case, case.pick(*files))
    _use(case, folder)


def _use(case: Case, folder: str) -> None:
    write_yaml(case.here / "run.yaml", SETTINGS | {"base_model": f"./{folder}", "tokenizer": "./model"})
    lines = [["train", "run.yaml"], ["train", "run.yaml"], ["convert", folder, "target"], ["inspect", "run.yaml"]]
    case.outputs |= {"target"}
    case.tessera(*case.pick(*lines))


@group(3)
def safetensors(case: Case) -> None:
    """Headers, offsets and lengths of safetensors files, and what an index says of them."""
    case.kind, folder = 18, case.pick("model", "shards")
    file = case.pick(*sorted((case.here / folder).glob("*.safetensors")))
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = case.pick(*(key for key in header if key != "__metadata__"))
    entry, form = header[name], case.cycle(*range(8))
    text: bytes | None = None
    if form == 0:
        entry["data_offsets"] = [case.dice.choice(hostile.SIZES), case.dice.choice(hostile.SIZES)]
    elif form == 1:
        entry["shape"] = case.pick(
            [10**9, 10**9], [0], [], [-1], [2**63], [10**400], ["x"], [True], [[1]], None, [1] * 500
        )
    elif form == 2:
        entry[case.pick("dtype", "shape", "data_offsets")] = case.pick(
            "F8", "I64", "BF16", "", None, 3, hostile.value(case.dice)
        )
    elif form == 3:
        text = hostile.json_text(case.dice)
    elif form == 4:
        length = case.dice.choice([0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001])
        file.write_bytes(struct.pack("<Q", length) + content[8:])
    elif form == 5:
        header[case.pick("\0", "\ud800", "a" * 10_000, "__metadata__", "")] = case.pick(entry, None, {"a": 1}, [])
    elif form == 6:
        file.write_bytes(hostile.garbled(content, case.dice))
    else:
        index = case.here / "shards/model.safetensors.index.json"
        names = json.loads(index.read_text())["weight_map"]
        names[case.pick(*names, "new")] = case.pick(
            "\0", "a\0.safetensors", "\ud800", "..", ".", "", "a" * 5000, "../model/model.safetensors", "/dev/zero",
            3, None, [], "model.safetensors.index.json", "CON", "x\n",
        )  # fmt: skip
        index.write_text(json.dumps({"weight_map": case.pick(names, names, list(names), {}, None)}))
        folder = "shards"
    if form in (0, 1, 2, 3, 5):
        text = json.dumps(header).encode() if text is None else text
        file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    case.what = f"{folder}/{file.name}, form {form}"
    _use(case, folder)


OTHER_KEYS = ["eos_token", "added_tokens_decoder", "additional_special_tokens", "chat_template", "add_eos_token"]
TOKEN_TEXTS = [
    "north <|turn|> wind",
    "<|endoftext|>sea",
    " wind<x>river ",
    "stone",
    "<|turn|><|turn|>",
    "The sea; naïve café",
    "<x>",
]


@group(4)
def tokens(case: Case) -> None:
    """What a folder says beside tokenizer.json: the ids are those of AutoTokenizer, or the folder is refused."""
    case.kind, folder = 21, case.here / "model"
    entry = {
        "content": "<|turn|>", "special": case.pick(True, False), "lstrip": case.pick(True, False), "rstrip": False,
        "normalized": False, "single_word": False,
    }  # fmt: skip
    edits: dict[str, dict[str, Any]] = {
        "additional_special_tokens": {"additional_special_tokens": ["<|turn|>"]},
        "added_tokens_decoder": {"added_tokens_decoder": {"290": entry}},
        "eos_token": {"eos_token": case.pick("<|turn|>", "stone", "a", {"content": "<|turn|>"}, None, "<x>")},
        "bos_token": {"bos_token": case.pick("<|turn|>", "<|endoftext|>"), "add_bos_token": True},
        "add_prefix_space": {"add_prefix_space": True},
        "other": {case.pick(*OTHER_KEYS): hostile.value(case.dice)},
        "chat": {"chat_template": "{{ messages }}", "pad_token": "<x>", "extra_special_tokens": {"image": "<|turn|>"}},
    }  # fmt: skip
    name = case.cycle(
        *edits, "added_tokens.json", "tokenizer.json", "special_tokens_map.json", "tokenizer.json", "nothing"
    )
    case.what = name
    if name in edits:
        case.what = json.dumps(edits[name])[:120]
        change_json(folder / "tokenizer_config.json", lambda content: content.update(edits[name]))
    elif name == "added_tokens.json":
        (folder / name).write_text(
            json.dumps(case.pick({"<|turn|>": 290}, {"<|turn|>": 2**31}, {"<x>": -1}, [], {"<x>": "a"}))
        )
    elif name == "special_tokens_map.json":
        (folder / name).write_text(
            json.dumps(case.pick({"additional_special_tokens": ["<x>"]}, {"eos_token": "<x>"}, {"eos_token": 3}, []))
        )
    elif name == "tokenizer.json":
        what = case.pick("id", "post", "normalizer", "garbled", "vocab", "prefix")
        case.what += f" {what}"
        change_json(folder / name, lambda content: _spoil_tokenizer(content, what, entry, case))
    seen = case.call(lambda: _compare_tokens(case.here / "model"), "load_tokenizer", codes=(0, 2, 3))
    if seen.code == 3:
        case.wrong(f"other ids than AutoTokenizer: {seen.err.strip()[-300:]}")
    if case.dice.random() < 0.4:
        mark, text = case.pick("eos_token", "pad_token", "bos_token"), case.pick("<new>", "a", "<|endoftext|>")
        given = {
            "special_tokens": {mark: text},
            "tokens": case.pick([], ["<new>", "stone"], ["\u00e9"]),
            "resize_token_embeddings_to_32x": case.pick(True, False),
        }
        write_yaml(case.here / "run.yaml", SETTINGS | case.pick({}, given, given))
        case.tessera("train", "run.yaml")


def _spoil_tokenizer(content: dict[str, Any], what: str, entry: dict[str, Any], case: Case) -> None:
    if what == "id":
        content["added_tokens"].append(entry | {"id": case.pick(290, 2**31, 2**32, 2**63, -1, 5, 0)})
    elif what == "post":
        template = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": template,
            "pair": template,
            "special_tokens": special,
        }
    elif what == "normalizer":
        content["normalizer"] = case.pick(
            {"type": "Lowercase"}, {"type": "Prepend", "prepend": "_"}, {"type": "NFKC"}, {"type": "x"}, 3
        )
    elif what == "prefix":
        content["pre_tokenizer"]["add_prefix_space"] = True
    elif what == "vocab":
        content["model"]["vocab"][case.pick("new", "a")] = case.pick(2**31, 2**32, 10**6, -1, 0, 295)
    else:
        content[case.pick(*content)] = hostile.value(case.dice)


def _compare_tokens(folder: Path) -> None:
    from transformers import AutoTokenizer

    from data.helpers import encoded
    from tessera.core.errors import UserError
    from tessera.data.tokenizer import load_tokenizer

    try:
        ours = load_tokenizer(folder, "base_model")
        found = [ids.tolist() for ids in encoded(ours, TOKEN_TEXTS)]
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    try:
        theirs = AutoTokenizer.from_pretrained(folder)
        expected = [theirs(text)["input_ids"] for text in TOKEN_TEXTS]
    except Exception:  # no folder for them either
        return
    expected = [ids[:-1] if ids and ids[-1] == ours.eos_id else ids for ids in expected]
    for text, one, other in zip(TOKEN_TEXTS, found, expected, strict=True):
        doubled = other[:2] == [ours.eos_id] * 2  # what opens a text once more before a text that begins with it
        if one != (other[1:] if doubled else other):
            print(f"{text!r}: {one}, AutoTokenizer {other}", file=sys.stderr)
            raise SystemExit(3)
    if theirs.eos_token_id is not None and theirs.eos_token_id != ours.eos_id:
        print(f"end token {ours.eos_id}, AutoTokenizer {theirs.eos_token_id}", file=sys.stderr)
        raise SystemExit(3)


@group(2)
def end_tokens(case: Case) -> None:
    """Every end token named in the folder that is handed out is that of the rows, beside those of the model."""
    case.kind, folder = 20, case.here / "model"
    own = case.pick([5, 7], 5, [0, 9], None)
    change_json(folder / "generation_config.json", lambda content: content.update({"eos_token_id": own}))
    change_json(folder / "config.json", lambda content: content.update({"eos_token_id": case.pick(own, 0, 12)}))
    settings, mode = SETTINGS | {"max_steps": 1, "save_steps": None}, case.cycle("given", "trained", "own")
    if mode == "given":
        _other_tokenizer(case.here / "given", folder)
        settings["tokenizer"] = "./given"
    elif mode == "trained":
        settings |= {"tokenizer": {"train": "bpe", "vocab_size": 280}, "random_init": True}
    case.what = f"{mode} tokenizer, generation_config.json {own}"
    write_yaml(case.here / "run.yaml", settings)
    if case.tessera("train", "run.yaml").code != 0:
        return
    new = case.here / "new"
    end = json.loads((new / "prepared/manifest.json").read_text())["eos_token_id"]
    wanted = {end, *(own if isinstance(own, list) else [own] if own is not None else [])} if mode == "own" else {end}
    for name in ("config.json", "generation_config.json"):
        said = json.loads((new / name).read_text()).get("eos_token_id") if (new / name).exists() else end
        found = set(said) if isinstance(said, list) else {said}
        if not wanted <= found:
            case.wrong(f"rows end on {end}, but {name} says {said}")


def _other_tokenizer(folder: Path, source: Path) -> None:
    """The same vocabulary, another token at its end."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (source / name).read_text()
        (folder / name).write_text(text)
    vocabulary = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    end = next(token for token, number in vocabulary.items() if number == 11)
    change_json(folder / "tokenizer_config.json", lambda content: content.update({"eos_token": end}))
