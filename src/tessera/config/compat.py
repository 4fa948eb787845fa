"""Keys and values that users know from axolotl, Hugging Face's Trainer, accelerate and DeepSpeed: other_tools.yaml.

Each has one of three verdicts: Tessera does it (under its own name, or under the one given here), it has no effect, for
the reason given in one line, or it is refused, with what to do instead.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import yaml

NOTHING: tuple[object, ...] = (None, False, "", [], {})
"""Values with which a key asks for nothing, whatever its name."""

_T = TypeVar("_T")


def is_same(value: object, other: object) -> bool:
    """Whether two values mean the same: 1 and 1.0 do, 1 and true, which are equal in Python, do not."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def is_one_of(value: object, values: Iterable[object]) -> bool:
    """Whether one of `values` means the same."""
    return any(is_same(value, one) for one in values)


def asks_for_nothing(value: object) -> bool:
    """Whether a key of any name asks for nothing with this value."""
    return is_one_of(value, NOTHING)


@dataclass(frozen=True)
class Refused:
    """A key that is refused: what it asks for, further values that ask for nothing, and what to do instead."""

    what: str
    neutral: tuple[object, ...] = ()
    instead: str = "remove it"

    def lets_pass(self, value: object) -> bool:
        """Whether `value` asks for nothing. False does ask where true does not: the switch is on by default."""
        if value is False and is_one_of(True, self.neutral):
            return False
        return asks_for_nothing(value) or is_one_of(value, self.neutral)


@dataclass(frozen=True)
class OurName:
    """The key of ours that means the same as one of another tool; by what the value of that one is divided, or what
    its values are called here."""

    key: str
    divisor: int = 1
    values: Mapping[str, str] = field(default_factory=dict)

    def meant(self, value: object) -> object:
        """The value of our key that `value` means."""
        if self.divisor != 1 and isinstance(value, int | float) and not isinstance(value, bool):
            return value / self.divisor
        return self.values.get(value, value) if isinstance(value, str) else value


@dataclass(frozen=True)
class Verdicts:
    """What becomes of the keys of other tools in one place of the file."""

    refused: Mapping[str, Refused]
    no_effect: Mapping[str, str]
    ours: Mapping[str, OurName]

    @property
    def others(self) -> dict[str, str | Refused]:
        """The keys that are no keys of ours under any name."""
        return {**self.no_effect, **self.refused}


def find(table: Mapping[str, _T], key: str) -> _T | None:
    """The row of `key`: its own, or the first whose name has a * and matches."""
    if key in table:
        return table[key]
    return next((row for name, row in table.items() if "*" in name and fnmatchcase(key, name)), None)


def _refused(row: str | list[Any]) -> Refused:
    what, *more = [row] if isinstance(row, str) else row
    given: dict[str, Any] = {"neutral" if isinstance(part, list) else "instead": part for part in more}
    return Refused(what, tuple(given.get("neutral", ())), given.get("instead", "remove it"))


def _our_name(row: str | list[Any]) -> OurName:
    name, *more = [row] if isinstance(row, str) else row
    given: dict[str, Any] = {"values" if isinstance(part, dict) else "divisor": part for part in more}
    return OurName(name, **given)


def _verdicts(place: str) -> Verdicts:
    refused, no_effect, ours = (_TABLES.get(table + place) or {} for table in ("refused", "no_effect", "spelled_here"))
    return Verdicts(
        {key: _refused(row) for key, row in refused.items()},
        no_effect,
        {key: _our_name(row) for key, row in ours.items()},
    )


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first, which not every PyYAML has, is ten times as fast
_TABLES: dict[str, Any] = yaml.load(Path(__file__).with_name("other_tools.yaml").read_text("utf-8"), Loader=_LOADER)

TOP, DATASETS, FSDP, DEEPSPEED = map(_verdicts, ("", "_in_datasets", "_in_fsdp", "_in_deepspeed"))
REFUSED_VALUES: dict[str, list[str]] = _TABLES["refused_values"]
INSTEAD_OF_VALUES: dict[str, str] = _TABLES["instead_of_values"]
NO_EFFECT_PLUGINS: dict[str, str] = _TABLES["no_effect_plugins"]
