"""What a key means, in the words of its definition: one by its name, or each above its line of a resolved config."""

import textwrap

import yaml

from tessera.config import compat
from tessera.config.schema import SECTIONS, TrainConfig
from tessera.config.words import key_name, values_of

_WIDTH = 100
OTHER_FORMS = {
    "fsdp": "FSDP in the words of FSDP1.",
    "deepspeed": "The path of a DeepSpeed config, or its values.",
    "plugins": "Plugins of axolotl; those that may stand here have no effect.",
}
"""Keys of other tools that have forms of their own, and are neither refused nor without effect."""


def explained(name: str) -> str | None:
    """What to know of the key `name`, those inside others with dots, ours or another tool's. None: no such key."""
    name = ".".join(part for part in key_name(name.replace("-", "_")).split(".") if not part.isdecimal())
    top, _, inner = name.partition(".")
    key, prefix = inner or top, f"{top}." if inner else ""
    if key in (section.model_fields if (section := SECTIONS.get(top) if inner else TrainConfig) else ()):
        return _own(name, prefix, key)
    if not inner and key in OTHER_FORMS:
        return _told(name, OTHER_FORMS[key])
    table = _tables(top if inner else "")
    if table is None:
        return None
    if key in table.ours:
        ours = table.ours[key]
        divided = f", divided by {ours.divisor}" if ours.divisor != 1 else ""
        return f"{name} is called {prefix}{ours.key} here{divided}\n\n{explained(prefix + ours.key)}"
    row = compat.find(table.others, key)
    if isinstance(row, compat.Refused):
        return _told(name, f"Not supported ({row.what}): {row.instead}.")
    return None if row is None else _told(name, f"No effect: {row}.")


def meaning(name: str, indent: str = "") -> list[str]:
    """What a key of ours does, as lines of comment."""
    top, _, inner = name.partition(".")
    text = (SECTIONS[top] if inner else TrainConfig).model_fields[inner or top].description or ""
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _tables(top: str) -> compat.Verdicts | None:
    places = {"": compat.TOP, "datasets": compat.DATASETS, "test_datasets": compat.DATASETS, "fsdp_config": compat.FSDP}
    return places.get(top)


def _own(name: str, prefix: str, key: str) -> str:
    """Meaning, values, default and other names of a key of ours; of one that holds others, those."""
    field = (SECTIONS[prefix[:-1]] if prefix else TrainConfig).model_fields[key]
    inner = SECTIONS.get(key) if not prefix else None
    lines = [field.description or ""]
    if values := values_of(name):
        lines.append(f"Values: {', '.join(values)}.")
    default = field.get_default()
    if field.is_required():
        lines.append("It must be given.")
    elif inner is None or default is None:
        told = yaml.safe_dump(default, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
        lines.append("Default: unset." if default is None else f"Default: {told}.")
    table = _tables(prefix[:-1])
    if names := [other for other, ours in (table.ours if table else {}).items() if ours.key == key]:
        lines.append(f"Other names: {', '.join(names)}.")
    if inner is not None:
        lines.append(f"Keys in it: {', '.join(inner.model_fields)} (tessera config show {name}.KEY).")
    return _told(name, *lines)


def _told(name: str, *lines: str) -> str:
    wrapped = (textwrap.wrap(line, _WIDTH, initial_indent="  ", subsequent_indent="  ") for line in lines if line)
    return "\n".join([name, *(line for part in wrapped for line in part)])
