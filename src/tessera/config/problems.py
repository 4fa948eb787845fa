"""Mistakes in a config in words: what pydantic found fault with becomes one `UserError` for each key."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from tessera.config import compat
from tessera.config.reader import nearest
from tessera.config.schema import SECTIONS, TrainConfig
from tessera.config.sections.section import Section
from tessera.config.settled import SOURCES
from tessera.config.words import shown
from tessera.core.errors import UserError

MOST_SHOWN = 20
"""Problems of one config that are listed."""
MOST_UNKNOWN = 5
"""Unknown keys that are told one by one."""

KeyPath = tuple[int | str, ...]  # of a value: the keys, and numbers in lists, that lead to it


class ConfigError(UserError):
    """Several mistakes in one configuration; `problems` holds each."""

    def __init__(self, source: str, problems: list[UserError]) -> None:
        self.problems = problems
        lines: list[str] = []
        hints: set[str] = set()
        for problem in problems[:MOST_SHOWN]:
            again = len(problem.hint) > 100 and problem.hint in hints
            lines.append(str(problem).removesuffix(f"\n  {problem.hint}") if again else str(problem))
            hints.add(problem.hint)
        if len(problems) > MOST_SHOWN:
            lines.append(f"and {len(problems) - MOST_SHOWN} more")
        super().__init__(source, f"{len(problems)} problems", "\n".join(lines).replace("\n", "\n  "))


_OTHER_FILES = (  # keys that tell a file, what it is, what to give instead
    ({"architectures", "model_type", "hidden_size", "n_embd"}, "a model's config.json", "base_model: its folder"),
    ({"zero_optimization"}, "a DeepSpeed config", "deepspeed: that file"),
    ({"compute_environment", "distributed_type"}, "a config of accelerate", "the keys of docs/keys.md"),
    ({"tokenizer_class", "added_tokens", "pre_tokenizer"}, "a file of a tokenizer", "base_model: its folder"),
    ({"weight_map"}, "a list of a model's weight files", "base_model: its folder"),
)


def check_kind(values: Mapping[Any, Any], source: str) -> None:
    """Raise UserError for a file that is something else than the config of a run."""
    if {"base_model", "datasets", "model_name_or_path"} & values.keys():
        return
    for keys, kind, instead in _OTHER_FILES:
        if keys & values.keys():
            hint = f"give a YAML file with {instead}; tessera config starter prints one"
            raise UserError("config file", source, f"is {kind}, not the config of a run", hint)


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
_OF_TYPE = {"int_type": 100, "int_from_float": 100, "float_type": 0.1, "bool_type": True}
_EXAMPLES = {"datasets": "[{path: ./book.txt}]", "path": "./book.txt"}


def problems_of(error: ValidationError, given_as: Mapping[str, str]) -> list[UserError]:
    """One `UserError` for each key that pydantic found fault with, called as it was given."""
    found: dict[KeyPath, list[Any]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(place_of(detail["loc"]), []).append(detail)
    unknown = [place for place, details in found.items() if details[0]["type"] == "extra_forbidden"]
    if len(unknown) > MOST_UNKNOWN:
        problems = [_problem(place, details, given_as) for place, details in found.items() if place not in unknown]
        return [*problems, _all_unknown([name_of(place) for place in unknown])]
    return [_problem(place, details, given_as) for place, details in found.items()]


def _all_unknown(names: list[str]) -> UserError:
    """One problem for many keys, so that it does not hide the others."""
    known = every_key()
    near = [(name, nearest(name, known).removeprefix("nearest: ").partition(" or ")[0]) for name in names[:MOST_SHOWN]]
    told = ", ".join(names[:MOST_UNKNOWN]) + f" and {len(names) - MOST_UNKNOWN} more"
    hint = ", ".join([f"{key} for {name}" for name, key in near if key][:MOST_UNKNOWN])
    return UserError(told, None, "are not known keys", f"nearest: {hint}" if hint else "")


def _problem(place: KeyPath, details: list[Any], given_as: Mapping[str, str]) -> UserError:
    """`details` has one entry, or one for each type that a key may have."""
    first, context = details[0], details[0].get("ctx", {})
    if isinstance(context.get("error"), UserError):  # raised by a check over several keys
        return context["error"]
    name, keys = given_as.get(name_of(place), name_of(place)), fields_at(place)
    key = str(place[-1])
    meaning = keys[key].description or "" if key in keys else ""
    if first["type"] == "missing" or (first["input"] is None and key in keys and keys[key].is_required()):
        return UserError(name, None, "is required", meaning)
    value = shown(first["input"])
    if first["type"] == "value_error":  # raised by a check of one value
        return UserError(name, value, str(context["error"]), meaning)
    if first["type"] == "extra_forbidden":
        return _unknown(place, name, value)
    wanted = [
        _WANTED[d["type"]].format(**d.get("ctx", {})) if d["type"] in _WANTED else d["msg"]
        for d in details
        if d is first or d["type"] != "int_type"  # "a number" has said it
    ]
    if first["type"] == "float_type" and type(first["input"]) is int:
        wanted = ["smaller"]  # than a float can be
    if first["type"] == "literal_error":
        # as YAML writes them
        wanted = [re.sub(r"\b(True|False)\b", lambda word: word[0].lower(), choice) for choice in wanted]
        meaning = _nearest_choice(value, re.findall(r"'([^']*)'", context["expected"])) or meaning
    hint = "\n  ".join(filter(None, [meaning, _to_write(first, key, keys)]))
    return UserError(name, value, f"must be {' or '.join(dict.fromkeys(wanted))}", hint)


def _nearest_choice(value: str, known: list[str]) -> str:
    """As `nearest`, whatever the case of letters; those that begin with `value` before others."""
    word = value.lower()
    longer = [choice for choice in known if choice.startswith(word)] if len(word) > 2 else []
    return f"nearest: {' or '.join(longer[:2])}" if longer else nearest(word, known)


def _unknown(place: KeyPath, name: str, value: str) -> UserError:
    top, key = str(place[0]), str(place[-1])
    keys = fields_at(place)
    section, _, within = key.partition(".")
    within = within.removeprefix("fsdp_") if section == "fsdp_config" else within
    if len(place) == 1 and section not in SOURCES and within in getattr(SECTIONS.get(section), "model_fields", ()):
        return UserError(name, value, f"is a key inside {section}", f"write {section}: {{{within}: {value}}}")
    hint = nearest(key, keys) or (nearest(key, every_key()) if len(place) == 1 else "")
    if not hint and top in SECTIONS and len(keys) <= 10:
        hint = f"known: {', '.join(keys)}"
    return UserError(name, value, "is not a known key", hint)


def every_key() -> list[str]:
    """Every key that the top of a file may hold, in the order in which a like one is looked for."""
    return [*TrainConfig.model_fields, *compat.TOP.ours, *compat.TOP.others]


def _to_write(detail: Mapping[str, Any], key: str, keys: Mapping[str, Any]) -> str:
    """An example of what to write where a value has the wrong type."""
    kind, given = detail["type"], detail["input"]
    if kind == "literal_error" and given in ("true", "false") and given.title() in detail["ctx"]["expected"]:
        return f"write {given}, without quotes"
    if kind == "string_type" and isinstance(given, int | float) and not isinstance(given, bool):
        return f"write '{given:g}d'" if key == "tensor_parallel_mode" else f"write '{shown(given)}', with quotes"
    if not kind.endswith("_type") and kind != "int_from_float" or key not in keys:
        return ""
    if isinstance(given, str) and kind in _OF_TYPE and re.fullmatch(r"[-+\d.eE_]+|true|false", given.strip()):
        return f"write {given.strip()}, without quotes"
    field = keys[key]
    example = _EXAMPLES.get(key) or next(iter(field.examples or ()), field.get_default())
    if example is None or field.is_required() and example not in (*_EXAMPLES.values(), *(field.examples or ())):
        example = _OF_TYPE.get(kind)
    if example is None or isinstance(example, Section):
        return ""
    return f"for example {key}: {shown(example)}"


def place_of(loc: KeyPath) -> KeyPath:
    """Where pydantic found fault, without the types that a key may have."""
    if loc[:1] == ("tokenizer",):
        return ("tokenizer", *loc[2:])
    return loc if loc and loc[0] in SECTIONS else loc[:1] or ("config",)


def fields_at(place: KeyPath) -> Mapping[str, Any]:
    """The known keys beside the one at `place`."""
    inside = [part for part in place[1:] if isinstance(part, str)]
    return (SECTIONS[str(place[0])] if inside else TrainConfig).model_fields


def name_of(place: KeyPath) -> str:
    """The key as a user would write it: `datasets[0].path`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
