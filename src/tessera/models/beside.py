"""What lies beside the weights of an exported model: config.json, generation_config.json, the tokenizer's files.

All of them name one set of end tokens, at which `generate` of transformers stops: those that the rows were trained to
end on, then those that the base model lists already.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tessera.core.device import dtype_name
from tessera.core.files import read_object
from tessera.data.auto_tokenizer import (
    OTHERS,
    TEMPLATES,
    TOKENIZER_SETTINGS,
    VOCABULARIES,
    has_tokenizer,
    read_auto,
)
from tessera.data.tokenizer import special_ids, text_of, token_ids
from tessera.models.config import ModelConfig
from tessera.models.families.table import FAMILIES

GENERATION = "generation_config.json"
TOKENIZER_FILES = (*VOCABULARIES, *TOKENIZER_SETTINGS, *OTHERS)


def read_generation_config(source: Path) -> dict[str, Any]:
    """generation_config.json of a model folder; empty where there is none. UserError: it is not JSON."""
    return _read_object(source / GENERATION)


def write_beside(
    aside: Path, source: Path, tokenizer: Path, model: ModelConfig, dtype: torch.dtype, changes: Mapping[str, Any]
) -> None:
    """Write config.json, true of weights in `dtype`, and the files that go beside it, into the folder `aside`.

    `source` is the base model's folder and `tokenizer` that of the rows. `changes` go into config.json; its
    `eos_token_id` names the tokens that the rows were trained to end on.
    """
    config, generation = _read_object(source / "config.json"), read_generation_config(source)
    learnt = token_ids(changes.get("eos_token_id"))
    auto = read_auto(tokenizer, "tokenizer") if learnt and has_tokenizer(tokenizer) else None
    listed = token_ids((generation if "eos_token_id" in generation else config).get("eos_token_id"))
    marks: dict[str, Any] = {}
    if auto and tokenizer.resolve() != source.resolve():  # the base model's numbers are another tokenizer's
        special = special_ids(auto.backend_tokenizer)
        ordinary = set(range(len(auto))) - special
        listed = [token for token in listed if token not in ordinary and token < model.vocab_size]
        for mark, otherwise in (("bos", learnt[0]), ("pad", None)):
            old = config.get(f"{mark}_token_id")
            own = getattr(auto, f"{mark}_token_id")
            marks[f"{mark}_token_id"] = own if own is not None else old if old in special else otherwise
    marks |= changes
    if ends := list(dict.fromkeys(learnt + listed)):
        marks["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    name = dtype_name(dtype)
    config |= {key: name for key in ("dtype", "torch_dtype") if key in config} or {"dtype": name}
    config |= marks
    config |= {"architectures": [FAMILIES[model.family].architecture], "vocab_size": model.vocab_size}
    write_json(aside / "config.json", config)
    ours = {key: value for key, value in marks.items() if key == "eos_token_id" or key in generation}
    if ours or (source / GENERATION).is_file():  # made where there is none: not every reader falls back to config.json
        _copy_changed(source / GENERATION, aside, generation, ours)
    for file in TOKENIZER_FILES:
        if (tokenizer / file).is_file():
            shutil.copyfile(tokenizer / file, aside / file)
    if (tokenizer / TEMPLATES).is_dir():
        shutil.copytree(tokenizer / TEMPLATES, aside / TEMPLATES)
    if auto and (end := auto.backend_tokenizer.id_to_token(learnt[0])) is not None:
        _name_end(aside, end)


def write_json(file: Path, content: object) -> None:
    """Write `content` for people to read."""
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _name_end(folder: Path, end: str) -> None:
    """Make `end` the eos_token of the tokenizer's files in `folder`; files that say so already stay byte for byte."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = _read_object(folder / name)
        if text_of(content.get("eos_token")) != end and (content or name == "tokenizer_config.json"):
            write_json(folder / name, content | {"eos_token": end})


def _copy_changed(file: Path, folder: Path, content: dict[str, Any], changes: dict[str, Any]) -> None:
    """Copy a JSON file into `folder`, byte for byte where `changes` change nothing; it may be missing."""
    if file.is_file() and all(key in content and content[key] == value for key, value in changes.items()):
        shutil.copyfile(file, folder / file.name)
    else:
        write_json(folder / file.name, content | changes)


def _read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file that may be missing."""
    return read_object(file, "base_model") if file.is_file() else {}
