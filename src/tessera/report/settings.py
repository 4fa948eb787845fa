"""The config of a run, read from its resolved_config.yaml: each key with its value, those beside the defaults first."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from tessera.config.load import load_config
from tessera.config.reader import read_yaml
from tessera.config.schema import TrainConfig
from tessera.core.errors import UserError, cut_short
from tessera.train.notes import RESOLVED


@dataclass(frozen=True)
class Settings:
    """`values` are the keys as written, those inside others with dots, each value in a line of YAML; `changed` are the
    keys whose value is not the default. `problem` says why there is no `config`, or no values."""

    values: dict[str, str] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()
    config: TrainConfig | None = None
    problem: str = ""


def read_settings(folder: Path) -> Settings:
    """The config of the run in `folder`; whatever is wrong with it is said in `problem`."""
    file = folder / RESOLVED
    try:
        values = read_yaml(file)
    except UserError as error:
        return Settings(problem=f"{RESOLVED}: {error.reason}")
    shown = {cut_short(key, 100): cut_short(_in_one_line(value)) for key, value in _flat(values).items()}
    defaults = _defaults()
    changed = frozenset(key for key, value in shown.items() if defaults.get(key) != value)
    try:
        return Settings(shown, changed, load_config(file)[0])
    except UserError as error:
        return Settings(shown, changed, problem=f"{RESOLVED}: {cut_short(error)}")


def _flat(values: dict[Any, Any], above: str = "") -> dict[str, Any]:
    """The keys of `values`, those inside others with dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = value
    return flat


def _defaults() -> dict[str, str]:
    """Every key that may be left out with the value that it then has, as `Settings.values` has it."""
    values: dict[str, Any] = {}
    for key, known in TrainConfig.model_fields.items():
        if not known.is_required():
            value = known.get_default(call_default_factory=True)
            values[key] = value.model_dump() if isinstance(value, BaseModel) else value
    return {key: _in_one_line(value) for key, value in _flat(values).items()}


def _in_one_line(value: object) -> str:
    """The value as YAML in a line; of data sets, which have many keys, those that are given."""
    if isinstance(value, list):
        value = [{k: v for k, v in e.items() if v is not None} if isinstance(e, dict) else e for e in value]
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=2**20)
    return text.removesuffix("\n").removesuffix("\n...")
