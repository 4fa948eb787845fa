"""One reader for YAML: files and the values of --set. Whatever is wrong with the text becomes one `UserError`.

It has `yaml.safe_load` semantics with two differences: `2e-5` is a number, and a key given twice is an error. What
would make PyYAML or those after it run for long is refused while it is read: size, depth, values counted with those
that aliases repeat, digits.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from tessera.core.errors import UserError, cut_short
from tessera.core.files import SURROGATE, read_text

BYTES = 2**18
"""Of a config file; PyYAML reads about as many in a second."""
DEPTH = 20
VALUES = 20_000
"""Keys and values of a file, each as often as aliases and merge keys repeat it."""
KEYS = 500
"""Keys of one mapping; all that are known, of other tools too, are fewer."""
DIGITS = 1000
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")


class _Loader(yaml.SafeLoader):
    """PyYAML's own, with limits; every error has a place in the text."""

    _values = _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        self._values += 1
        self._depth += 1
        if self._depth > DEPTH:
            raise _refused(f"nested deeper than {DEPTH} levels", mark)
        if self._values > VALUES:
            raise _refused(f"more than {VALUES} keys and values", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _count(node, {})
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag in _NUMBERS and len(node.value) > DIGITS:
            raise _refused(f"a number of {len(node.value)} digits", node.start_mark)
        try:
            value = super().construct_object(node, deep)
        except (yaml.YAMLError, UserError):
            raise
        except Exception as error:  # PyYAML leaves those of int(), date() and its tables as they are
            kind = node.tag.rpartition(":")[2]
            raise _refused(f"{cut_short(node.value, 60)!r} is not of type {kind}", node.start_mark) from error
        if isinstance(value, str) and SURROGATE.search(value):
            raise _refused("a text holds half of a surrogate pair", node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines and key.value != "<<":
                raise UserError(
                    key.value, None, f"given twice, in lines {lines[key.value]} and {line}", "keep one of them"
                )
            lines[str(key.value)] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(  # PyYAML itself wants a point and a sign: 2.0e-5
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _refused(problem: str, mark: yaml.Mark | None) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _count(node: yaml.Node, known: dict[yaml.Node, tuple[int, int]]) -> tuple[int, int]:
    """The values in `node`, those of an alias each time, and its levels. Raises YAMLError where they are too many."""
    if node not in known:
        known[node] = (0, 0)  # being counted
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            if len(inner) > KEYS:
                raise _refused(f"{len(inner)} keys in one place, at most {KEYS} are read", node.start_mark)
            inner = [part for pair in inner for part in pair]
        counts = [_count(part, known) for part in inner]
        known[node] = (1 + sum(values for values, _ in counts), 1 + max((levels for _, levels in counts), default=0))
    values, levels = known[node]
    if values == 0:
        raise _refused("an alias stands inside what it repeats", node.start_mark)
    if values > VALUES or levels > DEPTH:
        too_many = f"more than {VALUES} keys and values" if values > VALUES else f"more than {DEPTH} levels"
        raise _refused(f"aliases make {too_many}", node.start_mark)
    return values, levels


def read_yaml(path: str | Path) -> dict[Any, Any]:
    """The mapping in the YAML file `path`, which may be a pipe.

    Raises `UserError` for a file that is missing, cannot be read, is not YAML, or not a mapping.
    """
    key = "config file"
    try:
        text = read_text(path, key, limit=BYTES, pipes=True)
    except UserError as error:
        hint = "give the YAML file inside it" if error.reason == "is a folder" else _nearest_files(Path(path))
        raise UserError(key, path, error.reason, hint) from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        found = "empty" if values is None else f"a {type(values).__name__}"
        raise UserError(key, path, f"is {found}, not keys with values", "for example base_model: ./my-llama")
    return values


def parse_yaml(text: str, source: str) -> Any:
    """The value of YAML `text`, which errors call `source`. Raises `UserError` for anything else."""
    try:
        return yaml.load(text, Loader=_Loader)
    except UserError:
        raise
    except Exception as error:  # its scanner too lets errors of int() and chr() through
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        said = getattr(error, "problem", None) or (str(error) if isinstance(error, yaml.YAMLError) else repr(error))
        raise UserError(source, None, f"is not YAML: {where}{cut_short(said, 200)}") from None


def nearest(word: str, known: Iterable[str]) -> str:
    """The words of `known` that are most like `word`, as a hint; none for a long word, which is not mistyped."""
    close = difflib.get_close_matches(word, list(known), n=2, cutoff=0.6) if len(word) <= 100 else []
    return f"nearest: {' or '.join(close)}" if close else ""


def _nearest_files(path: Path) -> str:
    try:
        names = [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    except (OSError, ValueError):
        names = []
    return nearest(path.name, names) or (f"in that folder: {', '.join(sorted(names)[:5])}" if names else "")
