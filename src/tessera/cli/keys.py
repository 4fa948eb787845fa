"""Keys of the YAML file as options of the commands that read it: `--learning-rate 1e-5`, also `learning_rate=1e-5`."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from typer.core import TyperCommand

from tessera.core.errors import UserError


class ReadsConfig(TyperCommand):
    """A command with the argument CONFIG and the option --set, to which each key of the file is an option as well."""

    def __init__(self, *args: Any, **keys: Any) -> None:
        keys["epilog"] = "Any key of the file is an option too: --learning-rate 1e-5, --datasets.0.path book.txt."
        super().__init__(*args, **keys)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Click's own, with keys turned into --set. Raises UserError for an option that is neither."""
        params: list[Any] = [param for param in self.get_params(ctx) if param.param_type_name == "option"]
        options = {name: not param.is_flag for param in params for name in (*param.opts, *param.secondary_opts)}
        return super().parse_args(ctx, with_keys_as_settings(args, options))


def with_keys_as_settings(words: Sequence[str], options: Mapping[str, bool]) -> list[str]:
    """The command's words with `--set KEY=VALUE` in place of keys; `options` says which of its own take a value."""
    rest, out = list(words), list[str]()
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word == "--":
            return [*out, word, *rest]
        if name in options:
            out.append(word)
            if options[name] and not equals:
                out += [rest.pop(0) for _ in rest[:1]]
        elif name == "--config":  # as the launchers of other tools call the file
            out += [value] if equals else [rest.pop(0) for _ in rest[:1]]
        elif name.startswith("--"):
            out += ["--set", _setting(name, value if equals else None, rest, options)]
        elif equals and not word.startswith("-") and _find(name) is not None and not os.path.exists(word):
            out += ["--set", word]
        else:
            out.append(word)
    return out


def _setting(name: str, value: str | None, rest: list[str], options: Mapping[str, bool]) -> str:
    """KEY=VALUE of the option `name`; a value that the option does not hold itself is taken from `rest`."""
    key = name[2:].replace("-", "_")
    kinds = _find(key)
    if kinds is None and value is None and key.startswith("no_") and bool in (_find(key[3:]) or ()):
        return f"{key[3:]}=false"
    if kinds is None:
        raise UserError(name, value, "is neither an option of this command nor a key of the file", _like(name, options))
    if value is None:
        word = rest[0] if rest else None
        given = word is not None and not word.startswith("--")
        if bool in kinds and not (given and _is_value(str(word), key, kinds)):
            value = "true"
        elif given:
            value = rest.pop(0)
        else:
            raise UserError(name, None, "has no value", f"write {name} VALUE")
    is_text = kinds == {str} and value not in ("null", "~")
    return f"{key}={json.dumps(value, ensure_ascii=False) if is_text else value}"


def _find(key: str) -> set[Any] | None:
    """The types that a key may have, with bool where they are not known; None for what is no key."""
    from tessera.config import compat
    from tessera.config.schema import SECTIONS, TrainConfig

    top, *inside = [part for part in key.replace("[", ".").replace("]", "").split(".") if not part.isdecimal()] or [""]
    fields = TrainConfig.model_fields if not inside else getattr(SECTIONS.get(top), "model_fields", {})
    name = inside[-1] if inside else top
    if name in fields:
        return _leaves(fields[name].annotation) - {type(None)}
    others = {**compat.TOP.others, **compat.TOP.ours, "fsdp": "", "deepspeed": "", "plugins": ""}
    known = top in TrainConfig.model_fields if inside else compat.find(others, name) is not None
    return {bool, object} if known else None


def _is_value(word: str, key: str, kinds: set[Any]) -> bool:
    """Whether `word` may be the value of a switch of these types, not the next argument."""
    from tessera.config.schema import TrainConfig
    from tessera.config.words import values_of

    switch = ["true", "false"]
    listed = values_of(key) if key in TrainConfig.model_fields else switch
    closed = kinds == {bool} or kinds == {bool, str} and set(listed) > set(switch)  # else it takes any text too
    return not closed or word.lower() in listed


def _leaves(annotation: Any) -> set[Any]:
    """The plain types in an annotation: {str, NoneType} of Optional[str], the types of a Literal's values."""
    inner = [part for part in get_args(annotation) if isinstance(part, type) or get_args(part)]
    values = [part for part in get_args(annotation) if isinstance(part, str | int | bool)]
    return {type(value) for value in values}.union(*map(_leaves, inner)) if inner or values else {annotation}


def _like(name: str, options: Mapping[str, bool]) -> str:
    """The options and keys that are most like `name`, as a hint."""
    from tessera.config.problems import every_key
    from tessera.config.reader import nearest

    return nearest(name, [*options, *(f"--{key.replace('_', '-')}" for key in every_key() if "*" not in key)])
