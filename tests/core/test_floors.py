"""The rooms of the house stand one above the other: no import leads upwards or in a circle (docs/architecture.md).

Every import counts, those inside functions and those for types alone too. And all data go through one door:
core/collectives.py alone calls what torch.distributed has to move them.
"""

import ast
import sys
from collections.abc import Iterable, Iterator
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
    ["monitor"],
    ["train"],
    ["launch"],
    ["inspect", "verify", "doctor"],
    ["measure"],
    ["report"],
    ["demos"],
    ["cli"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TRAIN_CONFIG = ("tessera.config.schema", "tessera.config.sections")
DOOR = "tessera.core.collectives"
BESIDE_THE_DOOR = {  # names of torch.distributed that move no data of a step → the modules that use them; and why
    "is_available is_initialized get_rank get_world_size": "tessera",  # who runs
    "init_process_group destroy_process_group": "tessera",  # a program begins and ends
    "ProcessGroup ReduceOp": "tessera",  # types
    "barrier": "tessera.train",  # waits, and moves nothing
    "device_mesh.DeviceMesh new_subgroups_by_enumeration": "tessera",  # the groups themselves
    "distributed_c10d._get_default_group": "tessera.core.mesh",  # its timeout
    "tensor.DTensor tensor.Placement tensor.Replicate tensor.Shard": "tessera",  # what lies where; never moved so
    "fsdp.CPUOffloadPolicy fsdp.FSDPModule fsdp.MixedPrecisionPolicy fsdp.OffloadPolicy fsdp.fully_shard": (
        "tessera.engine.fsdp"  # its collectives come back to the door
    ),
    "new_group checkpoint": "tessera.checkpoint",  # DCP writes beside training, in a group of its own
    "DistError PrefixStore Store TCPStore elastic rendezvous": "tessera.launch",  # processes find one another
    "is_gloo_available is_nccl_available": "tessera.doctor.devices",  # what torch is built with
    "Store": "tessera.train.trainer",  # a type
    "elastic.multiprocessing.errors.record": "tessera.demos.memory",  # a rank of its own says why it ended
}
METHODS = {"full_tensor", "redistribute"}  # of a DTensor: collectives that nobody sees


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
    if FLOOR.get(own, len(FLOORS)) < FLOOR["train"] and own != "config":
        found += [o for o in used if o.startswith(TRAIN_CONFIG)]
    return [f"{name} → {other}" for other in sorted(found)]


def distributed(text: str) -> Iterator[str]:
    """What a source text uses of torch.distributed, by the names below it; of process groups and DTensors, methods."""
    tree, meaning = ast.parse(text), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            meaning |= {
                a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
                for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module:
            meaning |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in METHODS:
            yield node.attr
        if isinstance(node, ast.Attribute) and getattr(node.value, "attr", "") == "process_group":
            yield f"process_group.{node.attr}"
        if isinstance(node, ast.Attribute | ast.Name) and id(node) not in inner:
            first, *rest = ast.unparse(node).split(".")
            name = ".".join([meaning.get(first, first), *rest])
            if name.startswith("torch.distributed."):
                yield name.removeprefix("torch.distributed.")


def beside_the_door(name: str, used: Iterable[str]) -> list[str]:
    """What module `name` may not use of torch.distributed."""
    allowed = [n for names, where in BESIDE_THE_DOOR.items() if name.startswith(where) for n in names.split()]
    return [f"{name}: {u}" for u in used if not any(u == a or u.startswith(f"{a}.") for a in allowed)]


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


def test_data_go_through_one_door():
    found = {name: set(distributed(path.read_text())) for name, path in modules().items()}
    assert {"batch_isend_irecv", "all_to_all_single", "all_reduce"} <= found.pop(DOOR)
    assert not [line for name, used in found.items() for line in beside_the_door(name, sorted(used))]
    unused = [
        n
        for names in BESIDE_THE_DOOR
        for n in names.split()
        if not any(u.startswith(n) for u in set().union(*found.values()))
    ]
    assert not unused, "an exception that nobody needs"


@pytest.mark.parametrize(
    "name, text",
    [
        ("tessera.engine.step", "import torch.distributed as dist\ndist.all_reduce(x)"),
        ("tessera.engine.step", "import torch\ntorch.distributed.all_reduce(x)"),
        ("tessera.engine.step", "from torch import distributed\ndistributed.broadcast(x, 0)"),
        ("tessera.engine.step", "def f(x):\n    from torch.distributed import isend as go\n    go(x, 1)"),
        ("tessera.engine.step", "from torch.distributed import _functional_collectives as c\nc.all_reduce(x)"),
        ("tessera.engine.step", "import torch.distributed.nn.functional as f\nf.all_to_all_single(x)"),
        ("tessera.engine.step", "import torch.distributed as dist\ndist.barrier()"),
        ("tessera.engine.step", "def f(group, x):\n    group.process_group.allreduce([x])"),
        ("tessera.nn.parameter", "def f(x):\n    return x.full_tensor()"),
        ("tessera.nn.parameter", "from torch.distributed.tensor import distribute_tensor\ndistribute_tensor(x)"),
        ("tessera.train.trainer", "import torch.distributed as dist\ndist.distributed_c10d.send(x, 1)"),
        ("tessera.train.trainer", "import torch.distributed.checkpoint as dcp\ndcp.save({})"),
    ],
)
def test_the_door_sees_who_goes_past_it(name, text):
    assert beside_the_door(name, distributed(text))


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
        ("tessera.engine.step", "from tessera.config.sections.layout import LayoutKeys", forbidden),
    ],
)
def test_the_rules_see_what_breaks_them(name, text, rule):
    assert rule(name, set(imported(text)))
