"""The rooms of the house stand one above the other: no import leads upwards or in a circle (docs/architecture.md).

Every import counts, those inside functions and those for types alone too.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
FLOORS = [  # bottom to top; rooms of one floor know nothing of one another
    ["core"],
    ["sizes"],
    ["config"],
    ["data"],
    ["product"],
    ["layout"],
    ["nn"],
    ["models"],
    ["engine"],
    ["plan"],
    ["checkpoint"],
    ["train"],
    ["launch"],
    ["inspect", "verify", "monitor"],
    ["demos"],
    ["cli"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TRAIN_CONFIG = "tessera.config.schema"
STILL_KNOW_TRAIN_CONFIG = {"tessera.layout.resolve", "tessera.plan.tune"}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name."""
    found = {}
    for path in sorted((SOURCE / "tessera").rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(text: str) -> Iterator[str]:
    """The modules that a source text imports, of a package's names that are modules themselves."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules() else node.module


@cache
def imports() -> dict[str, set[str]]:
    return {name: set(imported(path.read_text())) for name, path in modules().items()}


def room(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def upward(name: str, used: set[str]) -> list[str]:
    """What module `name` may not import of what it uses."""
    own = room(name)
    return [
        f"{name} → {other}"
        for other in sorted(used)
        if other.partition(".")[0] == "tessera" and own in FLOOR and room(other) != own
        if FLOOR.get(room(other), -1 if other == "tessera" else len(FLOORS)) >= FLOOR[own]
    ]


def forbidden(name: str, used: set[str]) -> list[str]:
    """Imports that no floor forbids, but the design does."""
    own, found = room(name), []
    if own == "sizes" or name in ("tessera.core.axes", "tessera.core.errors"):
        allowed = ("tessera.core.axes", "tessera.core.errors", "tessera.sizes")
        found += [o for o in used if o.split(".")[0] not in sys.stdlib_module_names and not o.startswith(allowed)]
    if FLOOR.get(own, len(FLOORS)) < FLOOR["train"] and own != "config" and name not in STILL_KNOW_TRAIN_CONFIG:
        found += [o for o in used if o.startswith(TRAIN_CONFIG)]
    return [f"{name} → {other}" for other in sorted(found)]


def test_every_room_has_a_floor():
    rooms = {room(name) for name in modules() if name.count(".") > 1}
    assert rooms <= FLOOR.keys()


def test_no_import_leads_upwards():
    assert not [line for name, used in imports().items() for line in upward(name, used)]


def test_no_forbidden_import():
    assert not [line for name, used in imports().items() for line in forbidden(name, used)]


def test_no_imports_in_a_circle():
    # the package itself names what it hands out, and imports it when asked
    graph = {name: {o for o in used if o in modules() and o != "tessera"} for name, used in imports().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize(
    "name, text, rule",
    [
        ("tessera.product.gathered", "from tessera.layout import streams", upward),
        ("tessera.nn.linear", "def f():\n    from tessera.models.config import ModelConfig", upward),
        ("tessera.plan.tune", "import tessera.train.trainer", upward),
        ("tessera.verify.check", "from tessera.inspect.held import Held", upward),
        ("tessera.sizes.rules", "import torch", forbidden),
        ("tessera.sizes.rules", "from tessera.core.device import local_device", forbidden),
        ("tessera.engine.step", "from tessera.config.schema import TrainConfig", forbidden),
    ],
)
def test_the_rules_see_what_breaks_them(name, text, rule):
    assert rule(name, set(imported(text)))
