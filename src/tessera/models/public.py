"""Shapes of public models, so that what needs sizes alone needs no network: the table public.csv, and names in it.

A row has the keys of a config.json that change what a decoder is made of, under their own names (families/ reads them
as it reads a file), and beside them:

    name         a short name, e.g. "llama-3.1-8b"
    sizes        the sizes that mean this model, e.g. "8B": one model has each, listed here and nowhere guessed
    parameters   how many it has, as its source says: exact, or rounded to the digits that are there ("18.4B")
    source       where sizes and parameters are from: a key of SOURCES
    rope_factor  the factor of llama3's rope_scaling, whose other values all models that use it share
    hub          its names on the Hugging Face hub; the first is the one whose config.json the row is

The other names of a row have the same sizes; their positions may differ. An empty cell is a key that is not there.
Rows that Lightning-AI/litgpt has too (litgpt/config.py at 0006c97, with links to each config.json) were compared
with it; tests/models/test_public.py counts the parameters of every row and compares them with the column.
"""

import csv
import json
import math
import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from tessera.core.errors import UserError
from tessera.models.config import ModelConfig
from tessera.models.families.table import model_config

SOURCES = {
    "hub": "config.json of the first hub name; the parameters are those of its safetensors, without buffers, a tied "
    "head counted once",
    "gpt3": "Brown et al. 2020, table 2.1, with GPT-2's vocabulary of 50,257 and 2,048 positions; attention is dense "
    "in every layer, 1.3B has 16 heads (24 of 128 do not make 2,048), 13B has 5,120 features (40 heads of 128)",
    "megatron": "Narayanan et al. 2021 (SC'21), table 1, with its vocabulary of 51,200 and 2,048 positions",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
UNITS = {"M": 10**6, "B": 10**9, "T": 10**12}
NEAREST = 4
"""Names that an error offers."""


@dataclass(frozen=True)
class PublicModel:
    """A row of the table; `content` is what its config.json says of a decoder's sizes."""

    name: str
    sizes: tuple[str, ...]
    parameters: str
    source: str
    hub: tuple[str, ...]
    content: dict[str, Any]

    @cached_property
    def config(self) -> ModelConfig:
        """The sizes, as a `ModelConfig` of its family."""
        return model_config(self.content, Path(f"{self.name}: config.json"))

    @property
    def names(self) -> set[str]:
        """What it may be called, in small letters: by its short name, and on the hub with and without the owner."""
        return {name.lower() for hub in self.hub for name in (hub, hub.split("/")[-1])} | {self.name}


@cache
def public_models() -> tuple[PublicModel, ...]:
    """Every row of the table, in its order."""
    text = files("tessera.models").joinpath("public.csv").read_text(encoding="utf-8")
    return tuple(_row(cells) for cells in csv.DictReader(text.splitlines()))


def _row(cells: dict[str, str]) -> PublicModel:
    own = {key: cells.pop(key) for key in ("name", "sizes", "parameters", "source", "hub")}
    factor = cells.pop("rope_factor")
    content = {key: cell if key == "model_type" else json.loads(cell) for key, cell in cells.items() if cell}
    if factor:
        content["rope_scaling"] = {**LLAMA3_ROPE, "factor": float(factor)}
    if not own["hub"]:  # of a paper, which states no dropout
        content |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    sizes, hub = tuple(own["sizes"].split()), tuple(own["hub"].split())
    return PublicModel(own["name"], sizes, own["parameters"], own["source"], hub, content)


@cache
def models_by_size() -> dict[int, PublicModel]:
    """The model that each size means, by its parameters as the size says them."""
    return {size: model for model in public_models() for text in model.sizes if (size := size_of(text))}


def public_model(name: str, key: str = "base_model") -> PublicModel | None:
    """The model of the table that `name` means, in capitals or not; None where it is none of its names.

    A name is a short name, one of the hub with or without its owner, or a size such as "70B". UserError, about `key`:
    a size that no model of the table is named by.
    """
    wanted = name.strip().lower()
    size = size_of(wanted)
    if size is None:
        return next((model for model in public_models() if wanted in model.names), None)
    by_size = models_by_size()
    if size in by_size:
        return by_size[size]
    near = sorted(sorted(by_size, key=lambda other: abs(math.log(other / size)))[:NEAREST])
    named = ", ".join(dict.fromkeys(f"{by_size[other].sizes[0]} ({by_size[other].name})" for other in near))
    raise UserError(key, name, "no model of the table is named by this size, and none is made up", f"nearest: {named}")


def nearest_names(name: str) -> str:
    """The short names that are most like `name`, for a hint."""
    last = name.lower().split("/")[-1][:60]
    ratio = lambda known: SequenceMatcher(None, last, known).ratio()  # noqa: E731
    return ", ".join(sorted((model.name for model in public_models()), key=ratio, reverse=True)[:NEAREST])


def size_of(text: str) -> int | None:
    """The parameters that a size means: 70,000,000,000 for "70B" (M and T too); None for text that is no size."""
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)([mbt])", text.strip().lower(), re.ASCII)
    return round(float(found[1]) * UNITS[found[2].upper()]) or None if found else None
