"""How keys and values of a config are written in messages."""

import json
import re
from typing import Any, Literal, get_args, get_origin

from tessera.config.schema import SECTIONS, TrainConfig
from tessera.core.errors import cut_short


def shown(value: object) -> str:
    """A value as YAML in one line has it, cut where it is long."""
    if isinstance(value, dict | list):
        text = json.dumps(value, default=str, skipkeys=True)
    else:
        text = json.dumps(value) if value is None or isinstance(value, bool) else cut_short(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def key_name(name: str) -> str:
    """A key without places in lists: `datasets.path` of `datasets[0].path`."""
    return re.sub(r"\[\d+\]", "", name)


def choices(name: str) -> str:
    """What a key with a closed set of values takes, as a hint."""
    values = values_of(name)
    return f"supported: {', '.join(values)}" if values else "remove it"


def values_of(name: str) -> list[str]:
    """The closed set of values that a key of ours takes; of others none."""
    top, _, inner = name.partition(".")
    return _literals((SECTIONS[top] if inner else TrainConfig).model_fields[inner or top].annotation)


def _literals(annotation: Any) -> list[str]:
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return [shown(choice) for choice in get_args(annotation)]
    return [choice for inner in get_args(annotation) for choice in _literals(inner)]
