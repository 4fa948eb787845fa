"""From a YAML file and `key=value` overrides to a checked `TrainConfig`, and back to YAML.

`reader.py` reads the text. Relative paths stay as given: they count from the current folder, as in axolotl.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError

from tessera.config import compat
from tessera.config.reader import nearest, parse_yaml, read_yaml
from tessera.config.schema import SECTIONS, TrainConfig
from tessera.core.errors import UserError, cut_short

MOST_SHOWN = 20
"""Problems of one config that are listed."""

_KeyPath = tuple[int | str, ...]  # of a value: the keys, and numbers in lists, that lead to it


class ConfigError(UserError):
    """Several mistakes in one configuration; `problems` holds each."""

    def __init__(self, source: str, problems: list[UserError]) -> None:
        self.problems = problems
        lines: list[str] = []
        hints: set[str] = set()
        for problem in problems[:MOST_SHOWN]:
            again = len(problem.hint) > 100 and problem.hint in hints  # the list of all keys
            lines.append(str(problem).removesuffix(f"\n  {problem.hint}") if again else str(problem))
            hints.add(problem.hint)
        if len(problems) > MOST_SHOWN:
            lines.append(f"and {len(problems) - MOST_SHOWN} more")
        super().__init__(source, f"{len(problems)} problems", "\n".join(lines).replace("\n", "\n  "))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[TrainConfig, list[str]]:
    """The configuration in the YAML file `path` with `overrides` ("key=value", the value YAML) on top of it.

    Also returns one line for each key that is accepted without effect. Raises `UserError`, with every problem
    of the file in one message.
    """
    values = read_yaml(path)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise UserError("--set", override, "is not key=value", "for example --set learning_rate=1e-4")
        values[key.strip()] = parse_yaml(text, f"--set {cut_short(override, 200)}")
    return make_config(values, str(path))


def make_config(values: Mapping[Any, Any], source: str = "config") -> tuple[TrainConfig, list[str]]:
    """The configuration of plain `values`, which errors call `source`; otherwise like `load_config`."""
    problems: list[UserError] = []
    notes: list[str] = []
    kept = _settle_other_tools(values, compat.NOT_DONE, "", problems, notes)
    if isinstance(kept.get("datasets"), list):
        kept["datasets"] = [
            _settle_other_tools(row, compat.NOT_DONE_IN_DATASETS, f"datasets[{i}].", problems, notes)
            if isinstance(row, dict)
            else row
            for i, row in enumerate(kept["datasets"])
        ]
    if isinstance(kept.get("fsdp_config"), dict):
        given = {str(key).removeprefix("fsdp_"): value for key, value in kept["fsdp_config"].items()}
        kept["fsdp_config"] = _settle_other_tools(given, compat.NOT_DONE_IN_FSDP, "fsdp_config.", problems, notes)
    try:
        config = TrainConfig.model_validate(kept)
    except ValidationError as error:
        problems += _problems(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError(source, problems)
    return config, notes + _without_effect(config)


def dump_config(config: TrainConfig) -> str:
    """`config` as YAML, every key resolved; `load_config` of it gives the same configuration."""
    values = config.model_dump()
    if config.warmup_steps is not None or config.lr_scheduler == "constant":
        del values["warmup_ratio"]  # does not count
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the YAML file, for editors: our keys, and those of other tools that pass."""
    schema = TrainConfig.model_json_schema()
    for key, why in compat.NO_EFFECT.items():
        schema["properties"][key] = {"description": f"No effect: {why}."}
    for key, later in compat.NOT_DONE.items():
        schema["properties"][key] = {"description": f"Not done yet: {later.meaning}.", "enum": list(later.neutral)}
    return schema


# ---- Problems


def _settle_other_tools(
    values: Mapping[Any, Any],
    not_done: Mapping[str, compat.NotDone],
    prefix: str,
    problems: list[UserError],
    notes: list[str],
) -> dict[str, Any]:
    """The values without the keys that only other tools know; what is to be said about those is appended."""
    kept: dict[str, Any] = {}
    for key, value in ((str(key), value) for key, value in values.items()):
        name, shown = prefix + key, _shown(value)
        plain = re.sub(r"\[\d+\]", "", name)
        if key in not_done:
            if not compat.asks_for_nothing(value, not_done[key]):
                reason = f"is known, but not done yet: {not_done[key].meaning}"
                problems.append(UserError(name, shown, reason, "leave it out"))
        elif isinstance(value, str) and value in compat.NOT_DONE_VALUES.get(plain, ()):
            problems.append(UserError(name, shown, "is known, but not done yet", _choices(plain)))
        elif not prefix and key in compat.SPELLED_HERE:
            ours = compat.SPELLED_HERE[key]
            problems.append(UserError(name, shown, f"is called {ours} here", f"write {ours}: {shown}"))
            kept.setdefault(ours, value)
        elif prefix == "fsdp_config." and key in compat.NO_EFFECT_IN_FSDP:
            notes.append(f"{name}: {shown} has no effect: {compat.NO_EFFECT_IN_FSDP[key]}")
        elif not prefix and key in compat.NO_EFFECT:
            plugins = value if isinstance(value, list) else [value]
            others = (
                [p for p in plugins if p not in compat.PLUGINS_WITHOUT_EFFECT] if key == "plugins" and value else []
            )
            problems += [UserError(key, _shown(plugin), "this plugin is not done", "leave it out") for plugin in others]
            if value:
                notes.append(f"{key}: {shown} has no effect: {compat.NO_EFFECT[key]}")
        else:
            kept[key] = value
    return kept


def _without_effect(config: TrainConfig) -> list[str]:
    """What is to be said about keys of ours that do nothing here; the resolved config of a run with auto has such."""
    lines = []
    key, schedule = "tensor_parallel_scratch_gib", config.tensor_parallel_schedule
    limit = getattr(config, key)
    if schedule != "auto" and limit != TrainConfig.model_fields[key].default:
        lines += [
            f"{key}: {limit:g} has no effect: it limits schedule auto, and tensor_parallel_schedule is {schedule}"
        ]
    if config.sample_packing and config.pad_to_sequence_len is False:
        lines += ["pad_to_sequence_len: false has no effect: rows of packed samples are always padded to sequence_len"]
    return lines


_WANTED = {
    "invalid_key": "a known key",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "finite",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "too_short": "a list of at least {min_length}",
    "string_too_short": "at least {min_length} character",
    "model_type": "keys with values",
    "literal_error": "one of {expected}",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
}


def _problems(error: ValidationError) -> list[UserError]:
    """One `UserError` for each key that pydantic found fault with."""
    found: dict[_KeyPath, list[Any]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(_place(detail["loc"]), []).append(detail)
    return [_problem(place, details) for place, details in found.items()]


def _problem(place: _KeyPath, details: list[Any]) -> UserError:
    """`details` has one entry, or one for each type that a key may have."""
    first, context = details[0], details[0].get("ctx", {})
    if isinstance(context.get("error"), UserError):  # raised by a check over several keys
        return context["error"]
    name, (top, *inside) = _name(place), [str(part) for part in place if isinstance(part, str)]
    key, keys = (inside[-1], SECTIONS[top].model_fields) if inside else (top, TrainConfig.model_fields)
    meaning = keys[key].description or "" if key in keys else ""
    if first["type"] == "missing":
        return UserError(name, None, "is required", meaning)
    shown = _shown(first["input"])
    if first["type"] == "value_error":  # raised by a check of one value
        return UserError(name, shown, str(context["error"]), meaning)
    if first["type"] == "extra_forbidden":
        section, _, within = key.partition(".")
        within = within.removeprefix("fsdp_") if section == "fsdp_config" else within
        if not inside and section != "datasets" and within in getattr(SECTIONS.get(section), "model_fields", ()):
            return UserError(name, shown, f"is a key inside {section}", f"write {section}: {{{within}: {shown}}}")
        others = [] if inside else [*compat.NO_EFFECT, *compat.NOT_DONE]
        hint = nearest(key, keys) or nearest(key, others) or f"known: {', '.join(keys)}"
        return UserError(name, shown, "is not a known key", hint)
    wanted = [
        _WANTED[d["type"]].format(**d.get("ctx", {})) if d["type"] in _WANTED else d["msg"]
        for d in details
        if d is first or d["type"] != "int_type"  # "a number" has said it
    ]
    if first["type"] == "float_type" and type(first["input"]) is int:
        wanted = ["smaller"]  # than a float can be
    if first["type"] == "literal_error":
        meaning = nearest(shown, re.findall(r"'([^']*)'", context["expected"])) or meaning
    return UserError(name, shown, f"must be {' or '.join(dict.fromkeys(wanted))}", meaning)


def _place(loc: _KeyPath) -> _KeyPath:
    """Where pydantic found fault, without the types that a key may have."""
    if loc[:1] == ("tokenizer",):
        return ("tokenizer", *loc[2:])
    return loc if loc and loc[0] in SECTIONS else loc[:1] or ("config",)


def _name(place: _KeyPath) -> str:
    """The key as a user would write it: `datasets[0].path`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def _choices(name: str) -> str:
    """What a key with a closed set of values takes, as a hint."""
    top, _, inner = name.partition(".")
    choices = _literals((SECTIONS[top] if inner else TrainConfig).model_fields[inner or top].annotation)
    return f"done: {', '.join(choices)}" if choices else "leave it out"


def _literals(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [_shown(choice) for choice in get_args(annotation)]
    return [choice for inner in get_args(annotation) for choice in _literals(inner)]


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        text = json.dumps(value, default=str, skipkeys=True)
    else:
        text = json.dumps(value) if value is None or isinstance(value, bool) else cut_short(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
