"""What becomes of the keys of other tools: each is taken as a key of ours, has no effect, or is refused (compat.py).

Here the tables of other_tools.yaml are applied; what FSDP1 and DeepSpeed say in words of their own is read in
`fsdp1.py` and `deepspeed.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tessera.config import compat
from tessera.config.compat import asks_for_nothing
from tessera.config.schema import SECTIONS, TrainConfig
from tessera.config.words import choices, key_name, shown
from tessera.core.errors import UserError

SOURCES = ("datasets", "test_datasets")
"""Keys that hold lists of data sets."""
_SECRET = ("hub_token", "api_key", "password")
"""Ends of keys of other tools whose values are not to be seen on a terminal."""


@dataclass
class Settled:
    """The values of our keys that a file comes to, and what is to be said about its other keys."""

    values: dict[str, Any]
    problems: list[UserError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    given_as: dict[str, str] = field(default_factory=dict)
    """The keys of ours that another one gave, such as `fsdp_config.offload_params`, with the name of that one."""
    refused: dict[tuple[str, str], list[tuple[str, object]]] = field(default_factory=dict)
    """What is not supported and what to do instead, with the keys and values that ask for it."""

    def every_problem(self) -> list[UserError]:
        """The problems, one for all keys that ask for the same."""
        found = list(self.problems)
        for (what, instead), asked in self.refused.items():
            verb, value = ("is", shown(asked[0][1])) if len(asked) == 1 else ("are", None)
            found.append(
                UserError(", ".join(name for name, _ in asked), value, f"{verb} not supported ({what})", instead)
            )
        return found

    def refuses(self, key: str) -> bool:
        """Whether `key` of another tool is among those that are not supported."""
        return any(name == key for asked in self.refused.values() for name, _ in asked)

    def refuse(self, name: str, value: object, reason: str, hint: str = "") -> None:
        """Add a problem."""
        self.problems.append(UserError(name, shown(value), reason, hint))

    def take(self, name: str, value: object, by: str, asked: object) -> None:
        """Set the key `name` of ours (a section's with a dot), which `by: asked` means; a problem where both differ."""
        top, _, inner = name.partition(".")
        values: Any = self.values
        if inner:
            if asks_for_nothing(values.get(top)):
                values[top] = {}
            values = values[top]
        key = inner or top
        if not isinstance(values, dict):
            return  # a section that is none is a problem of its own
        if asks_for_nothing(values.get(key)):
            values[key] = value
            self.given_as[name] = by
        elif not compat.is_same(values[key], value):
            told = (
                f"means {name}: {shown(value)}, and {self.given_as.get(name, name)}: {shown(values[key])} is given too"
            )
            self.refuse(by, asked, told, "keep one of the two")


def judged_sources(sources: object, key: str, out: Settled) -> object:
    """The data sets of `key` without the keys that only other tools know."""
    sources = as_sources(sources)
    if not isinstance(sources, list):
        return sources
    return [
        judged(row, compat.DATASETS, f"{key}[{place}].", out) if isinstance(row, dict) else row
        for place, row in enumerate(sources)
    ]


def as_sources(value: object) -> object:
    """A list of data sets where a path, a list of paths, or one data set alone is given."""
    if isinstance(value, dict) and value or isinstance(value, str) and value:
        value = [value]
    return [{"path": one} if isinstance(one, str) else one for one in value] if isinstance(value, list) else value


def judged(given: Mapping[str, Any], verdicts: compat.Verdicts, prefix: str, out: Settled) -> dict[str, Any]:
    """The values in one place of the file without the keys that only other tools know."""
    top = key_name(prefix.removesuffix("."))
    known = (SECTIONS.get(top, SECTIONS["datasets"]) if top else TrainConfig).model_fields
    others = verdicts.others
    kept: dict[str, Any] = {}
    for key, value in given.items():
        name = prefix + key
        row = None if key in known else compat.find(others, key)
        if key in verdicts.ours and key not in known:
            continue
        if key == "plugins" and not prefix:
            _judge_plugins(value, out)
        elif isinstance(row, compat.Refused):
            if not row.lets_pass(value):
                out.refused.setdefault((row.what, row.instead), []).append((name, value))
        elif isinstance(row, str):
            if not asks_for_nothing(value):
                told = "…" if key.endswith(_SECRET) else shown(value)
                out.notes.append(f"{name}: {told} has no effect: {row}")
        elif isinstance(value, str) and value in compat.REFUSED_VALUES.get(key_name(name), ()):
            hint = compat.INSTEAD_OF_VALUES.get(name) or choices(key_name(name))
            out.refuse(name, value, "is not supported", hint)
        else:
            kept[key] = value
    for key, value in given.items():  # after all of ours
        if key in verdicts.ours and key not in known and not asks_for_nothing(value):
            _take_as_ours(key, value, verdicts.ours[key], prefix, kept, out)
    return kept


def _take_as_ours(
    key: str, value: object, ours: compat.OurName, prefix: str, kept: dict[str, Any], out: Settled
) -> None:
    """Put the value of a key that has another name here where that name's belongs."""
    meant = ours.meant(value)
    named = f": {meant:g}" if isinstance(meant, float) else f": {meant}"
    said = f"is called {prefix + ours.key} here" + (named if meant is not value else "")
    if not asks_for_nothing(kept.get(ours.key)) and not compat.is_same(kept[ours.key], meant):
        told = f"{said}, and {ours.key}: {shown(kept[ours.key])} is given too"
        out.refuse(prefix + key, value, told, "keep one of the two")
        return
    kept[ours.key] = meant
    out.given_as[prefix + ours.key] = prefix + key
    out.notes.append(f"{prefix + key} {said}")


def _judge_plugins(value: object, out: Settled) -> None:
    plugins = [] if asks_for_nothing(value) else value if isinstance(value, list) else [value]
    for plugin in plugins:
        why = compat.NO_EFFECT_PLUGINS.get(plugin) if isinstance(plugin, str) else None
        if why is None:
            out.refuse("plugins", plugin, "this plugin is not supported", "remove it")
        else:
            out.notes.append(f"plugins: {plugin} has no effect: {why}")
