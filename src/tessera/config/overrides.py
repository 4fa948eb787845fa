"""Keys given on the command line, laid over those of the file: `key=value`, nested with dots and places in lists."""

import re
from collections.abc import Sequence
from typing import Any

from tessera.config import compat
from tessera.config.reader import DEPTH, parse_yaml
from tessera.config.settled import SOURCES, as_sources
from tessera.core.errors import UserError, cut_short


def lay_over(values: dict[Any, Any], overrides: Sequence[str]) -> set[str]:
    """Set each "key=value" (the value YAML) in `values`; the keys that were set, under our names.

    `datasets.0.path=x` sets a key inside a list. Raises UserError for text that is no such pair.
    """
    given = set()
    for override in overrides:
        key, separator, text = override.partition("=")
        places = [int(part) if part.isdecimal() else part for part in re.findall(r"[^.\[\]\s]+", key)]
        if not separator or not places or len(places) > DEPTH:
            raise UserError("--set", override, "is not key=value", "for example --set learning_rate=1e-4")
        value = parse_yaml(text, f"--set {cut_short(override, 200)}")
        head = _with_one_name(values, str(places[0]))
        if head in SOURCES and len(places) > 1:
            values[head] = as_sources(values.get(head))
        _set(values, [head, *places[1:]], value, cut_short(key.strip(), 200))
        given.add(".".join(map(str, [head, *places[1:]])))
    return given


def _with_one_name(values: dict[Any, Any], key: str) -> str:
    """`key` as it is called here, after taking away what the file gives under the key's other names."""
    ours = compat.TOP.ours
    meant = ours[key].key if key in ours else key
    name = key if key in ours and ours[key].divisor != 1 else meant
    for other in [other for other in values if other != name and (other == meant or _is_called(other, meant))]:
        values[name] = values.pop(other)
    return name


def _is_called(other: object, meant: str) -> bool:
    return isinstance(other, str) and other in compat.TOP.ours and compat.TOP.ours[other].key == meant


def _set(values: Any, places: Sequence[int | str], value: object, key: str) -> None:
    """Set the value at `places` inside `values`; a list may grow by one entry."""
    for count, (place, following) in enumerate(zip(places, [*places[1:], None], strict=True)):
        within = ".".join(map(str, places[:count]))
        if isinstance(values, list):
            if not isinstance(place, int):
                raise UserError(f"--set {key}", None, f"{within} is a list", f"write {within}.0.{place}")
            if place > len(values):
                reason = f"{within} has {len(values)} entries, which are counted from 0"
                raise UserError(f"--set {key}", None, reason, f"write {within}.{len(values)} to add one")
            values += [None] * (place == len(values))
        elif isinstance(values, dict):
            place = str(place)
            values.setdefault(place, None)
        else:
            raise UserError(f"--set {key}", None, f"{within} holds no keys", f"write {within}=… with its whole value")
        if following is None:
            values[place] = value
        elif values[place] is None:
            values[place] = [] if isinstance(following, int) else {}
        values = values[place]
