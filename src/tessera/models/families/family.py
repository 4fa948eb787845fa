"""Family and Module: what a family's file in this folder says of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tessera.models.config import ModelConfig
from tessera.models.families.keys import Keys

HEAD = "lm_head.weight"
"""The name of the output head's weight in all families; a tied one may be stored under it too."""


@dataclass(frozen=True)
class Module:
    """A module of a Hugging Face model and ours that it holds, with those of `kinds` that ours have.

    `{i}` is the layer. Several of ours are joined along their outputs in this order. A `transposed` weight is
    stored [in, out] (GPT-2's Conv1D), while ours are [out, in].
    """

    name: str
    ours: tuple[str, ...]
    transposed: bool = False
    kinds: tuple[str, ...] = ("weight", "bias")


@dataclass(frozen=True)
class Family:
    """One family: how its config.json is read, and which of its modules hold our parameters.

    `prefix` opens names in the files of a language model; those of its base model alone lack it. `aliases` are other
    names of config.json's keys. `buffers` are the ends of names of tensors that are no parameters and that older files
    hold.
    """

    architecture: str
    prefix: str
    read: Callable[[Keys], ModelConfig]
    modules: tuple[Module, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
