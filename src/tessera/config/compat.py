"""Keys and values that users know from axolotl, Hugging Face's Trainer and accelerate: the tables of other_tools.yaml.

Each is either not done yet (an error that says so by name, unless the value asks for nothing), spelled
differently here, or accepted without effect, for the reason given in one line.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class NotDone:
    """A key of another tool that is not done yet: its meaning, and the values that ask for nothing."""

    meaning: str
    neutral: tuple[object, ...] = (None, False, "", [], {})


_TABLES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("other_tools.yaml").read_text("utf-8"))


def _not_done(table: str) -> dict[str, NotDone]:
    return {key: NotDone(meaning, *map(tuple, neutral)) for key, (meaning, *neutral) in _TABLES[table].items()}


NOT_DONE = _not_done("not_done")
NOT_DONE_IN_DATASETS, NOT_DONE_IN_FSDP = _not_done("not_done_in_datasets"), _not_done("not_done_in_fsdp")
NOT_DONE_VALUES: dict[str, list[str]] = _TABLES["not_done_values"]
SPELLED_HERE: dict[str, str] = _TABLES["spelled_here"]
NO_EFFECT: dict[str, str] = _TABLES["no_effect"]
NO_EFFECT_IN_FSDP: dict[str, str] = _TABLES["no_effect_in_fsdp"]
PLUGINS_WITHOUT_EFFECT: list[str] = _TABLES["plugins_without_effect"]


def asks_for_nothing(value: object, key: NotDone) -> bool:
    """Whether with `value` a key that is not done yet changes nothing."""
    # the types are compared too: True == 1, and False == 0
    return any(type(value) is type(neutral) and value == neutral for neutral in key.neutral)
