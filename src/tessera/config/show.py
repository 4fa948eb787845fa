"""The resolved config as a user reads it: YAML that loads to the same, with the origin of each value as a comment."""

import yaml

from tessera.config.explain import meaning
from tessera.config.load import Resolved, written_values
from tessera.config.sections.section import Section
from tessera.config.settled import SOURCES

_WIDEST = 60
"""Characters of a line beyond which the comments of the others do not move."""


def shown(resolved: Resolved, *, explain: bool = False) -> str:
    """Each key with its value and where that comes from; what is to be said about other keys on top.

    Of data sets, which have many keys, those that were given. With `explain`, what each key does stands above it.
    """
    told = meaning if explain else lambda name, indent="": []
    config = resolved.config
    lines = [(f"# {note}", "") for note in resolved.notes]
    for key, value in written_values(config).items():
        section = getattr(config, key)
        if key in SOURCES and section:
            value = [entry.model_dump(exclude_unset=True) for entry in section]
        lines += [("", ""), *((line, "") for line in told(key))] if explain else []
        if isinstance(section, Section):
            lines.append((f"{key}:", ""))
            for inner, each in value.items():
                lines += [(line, "") for line in told(f"{key}.{inner}", "  ")]
                lines.append((f"  {inner}: {_in_one_line(each)}", _origin(resolved, key, inner)))
        else:
            lines.append((f"{key}: {_in_one_line(value)}", _origin(resolved, key)))
    width = max(len(line) for line, origin in lines if origin and len(line) <= _WIDEST)
    return "".join(f"{line:<{width}}  # {origin}\n" if origin else f"{line}\n" for line, origin in lines)


def _origin(resolved: Resolved, key: str, inner: str = "") -> str:
    """Where the value of a key comes from, or of one inside a section."""
    name = f"{key}.{inner}" if inner else key
    given_as = resolved.given_as.get(name, name)
    also = f", as {given_as}" if given_as != name else ""
    above = {given_as, given_as.partition(".")[0]}
    if any(other in above or other.startswith(f"{given_as}.") for other in resolved.overridden):
        return f"command line{also}"
    section = getattr(resolved.config, key) if inner else resolved.config
    given = (inner or key) in section.model_fields_set and key in resolved.config.model_fields_set
    return f"file{also}" if given else "default"


def _in_one_line(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=2**20)
    return text.removesuffix("\n").removesuffix("\n...")
