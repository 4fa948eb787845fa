"""Sizes that fit and sizes that do not: what the messages say, and that the rules are those of the model's code."""

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml

from tessera.core import collectives
from tessera.core.errors import UserError
from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch
from tessera.layout.context import Context
from tessera.layout.parallel import Parallel
from tessera.layout.shape import length_multiple
from tessera.layout.streams import HIDDEN, HIDDEN_BY_HEADS, attention_layout, joins_rows, residual_layout
from tessera.models.config import ModelConfig
from tessera.models.decoder import Decoder
from tessera.nn.parameter import named_specs
from tessera.nn.rope import RopeConfig
from tessera.sizes.geometries import geometry_axes
from tessera.sizes.numbers import nearest
from tessera.sizes.remedies import check_sizes
from tessera.sizes.rules import Ask, TensorParallel, first_misfit
from tessera.sizes.schedule import Schedule

MODEL = {
    "hidden_size": 64,
    "num_attention_heads": 12,
    "kv_features": 48,
    "intermediate_size": 96,
    "vocab_size": 509,
}
SHAPE = {"num_attention_heads": 6, "kv_features": 6, "intermediate_size": 6}
CUBE = {"inner": 2, "row": 2, "col": 2}
CUBE_SIZES = CUBE | {"depth": 1}
DEEP = {"depth": 2, "row": 2, "col": 2}
OFF = {"prefetch": False, "defer": False, "overlap": False}
PANELS = {"summa": {"schedule": "summa"}, "cannon": {"schedule": "cannon"}, "slices 2": {"slices": 2}}


def refusal(tensor: TensorParallel, dimensions: dict[str, int], batch: int) -> UserError | None:
    try:
        check_sizes(tensor, dimensions, batch)
    except UserError as error:
        return error
    return None


# ---- What fits


@pytest.mark.parametrize(
    ("asked", "batch"),
    [
        (TensorParallel(), 1),
        *((TensorParallel("1d", size), 3) for size in (1, 2, 3, 4, 6, 12)),
        *((TensorParallel("2d", size), 4) for size in (4, 6, 16)),
        (TensorParallel("2d", mesh={"row": 4, "col": 1}), 4),
        (TensorParallel("2d", 4, mesh={"row": 2, "col": 2}), 2),
        (TensorParallel("2.5d", 8), 4),
        (TensorParallel("2.5d", 12, depth=3), 6),
        (TensorParallel("2.5d", mesh=DEEP, depth=2, depth_weights="shard", slices=16), 4),
        (TensorParallel("3d", 8), 4),
        (TensorParallel("3d", mesh={"inner": 3, "row": 1, "col": 4}, slices=1), 1),  # heads over col · inner
        (TensorParallel("2d", 4, sequence_parallel=False, slices=2, keep_gathered=True), 2),
        (TensorParallel("2d", 9, schedule="auto", keep_gathered=True, sequence_parallel=False), 3),
        *((TensorParallel("3d", 8, schedule=loop), 2) for loop in ("summa", "cannon")),
        *((TensorParallel("2d", 4, schedule=name, **OFF), 2) for name in ("gather", "auto")),
    ],
)
def test_sizes_that_fit(asked, batch):
    hidden = 72 if 3 in asked.axes.values() else 64
    check_sizes(asked, MODEL | {"hidden_size": hidden}, batch)


@pytest.mark.parametrize("batch", range(1, 9))
def test_a_cube_takes_any_batch_with_any_heads_that_col_divides(batch):
    check_sizes(TensorParallel("3d", 8), MODEL | SHAPE, batch)
    by_heads, by_rows, neither = (
        (attention_layout(CUBE_SIZES, batch, MODEL | heads), joins_rows(CUBE_SIZES, batch, MODEL | heads))
        for heads in ({}, SHAPE, {"num_attention_heads": 6})
    )
    assert by_heads == (HIDDEN if batch % 4 == 0 else HIDDEN_BY_HEADS, batch % 2 != 0)
    assert by_rows == neither == (HIDDEN, batch % 4 != 0)


# ---- What does not fit, and what is proposed

Case = tuple[TensorParallel, dict[str, int], int, str, list[str]]
MISFITS: dict[str, Case] = {
    "heads": (
        TensorParallel("1d", 5),
        {"kv_features": 60, "intermediate_size": 120},
        1,
        "tensor_parallel_size: 5",
        [
            "cuts num_attention_heads = 12 of the model 5 ways",
            "tensor_parallel_size: 4 or 6 fits this model and batch",
            "a model with num_attention_heads 10 or 15",
        ],
    ),
    "fewer heads than ranks": (
        TensorParallel("1d", 16),
        {},
        1,
        "tensor_parallel_size: 16",
        ["tensor_parallel_size: 12 fits", "num_attention_heads 16"],
    ),
    "heads, where another shape of as many ranks fits": (
        TensorParallel("2d", 8),
        SHAPE,
        8,
        "tensor_parallel_size: 8",
        ["num_attention_heads = 6 of the model 4 ways", "tensor_parallel_mesh: {row: 4, col: 2}", "6 or 24 fits"],
    ),
    "kv features": (
        TensorParallel("1d", 4),
        {"kv_features": 6},
        1,
        "tensor_parallel_size: 4",
        ["cuts num_key_value_heads × head_dim = 6", "num_key_value_heads × head_dim 4 or 8", "size: 3 or 6 fits"],
    ),
    "ffn": (
        TensorParallel("1d", 3),
        {"intermediate_size": 100},
        1,
        "tensor_parallel_size: 3",
        ["cuts intermediate_size = 100", "intermediate_size 99 or 102", "size: 2 or 4 fits"],
    ),
    "hidden": (
        TensorParallel("2d", 9),
        {},
        9,
        "tensor_parallel_size: 9",
        ["cuts hidden_size = 64 of the model 3 ways", "hidden_size 63 or 66", "tensor_parallel_size: 8 or 16 fits"],
    ),
    "hidden over a mesh": (
        TensorParallel("3d", mesh={"inner": 3, "row": 2, "col": 2}),
        {},
        6,
        "tensor_parallel_mesh: {inner: 3, row: 2, col: 2}",
        [
            "64 of the model 6 ways",
            "{inner: 2, row: 2, col: 3} or {inner: 2, row: 2, col: 2} or",
            "hidden_size 60 or 66",
        ],
    ),
    "hidden with weights cut over depth": (
        TensorParallel("2.5d", 8, depth_weights="shard"),
        {"hidden_size": 66},
        4,
        "tensor_parallel_size: 8",
        ["cuts hidden_size = 66 of the model 4 ways", "hidden_size 64 or 68"],
    ),
    "vocabulary": (
        TensorParallel("1d", 4),
        {"vocab_size": 5},
        1,
        "tensor_parallel_size: 4",
        ["without a row of the vocabulary of 5", "vocab_size 4 or 7", "tensor_parallel_size: 3 fits"],
    ),
    "size and depth": (
        TensorParallel("2.5d", 7),
        {},
        8,
        "tensor_parallel_size: 7",
        ["the depth of 2", "tensor_parallel_size: 6 or 8 fits"],
    ),
    "no size": (
        TensorParallel("2.5d"),
        {},
        8,
        "tensor_parallel_size: 1",
        ["the depth of 2", "tensor_parallel_size: 2 fits", "tensor_parallel_depth: 1"],
    ),
    "not a cube": (
        TensorParallel("3d", 12),
        {},
        4,
        "tensor_parallel_size: 12",
        ["is not a cube", "tensor_parallel_mesh: {inner: 2, row: 2, col: 3}", "tensor_parallel_size: 8 or 64 fits"],
    ),
    "not a cube, nor any mesh": (
        TensorParallel("3d", 10),
        {},
        4,
        "tensor_parallel_size: 10",
        ["tensor_parallel_mesh: {inner: 2, row: 2, col: 3} instead of tensor_parallel_size", "size: 8 or 64 fits"],
    ),
    "size and mesh": (
        TensorParallel("2d", 8, mesh={"row": 2, "col": 2}),
        {},
        8,
        "tensor_parallel_size: 8",
        ["tensor_parallel_mesh {row: 2, col: 2} makes 4", "tensor_parallel_size: 4", "_mesh: {row: 2, col: 4}"],
    ),
    "depth and mesh": (
        TensorParallel("2.5d", mesh=DEEP, depth=4),
        {},
        8,
        "tensor_parallel_depth: 4",
        ["tensor_parallel_depth: 2", "{depth: 4, row: 1, col: 2}"],
    ),
    "an axis that the geometry lacks": (
        TensorParallel("2d", mesh=CUBE),
        {},
        8,
        "tensor_parallel_mesh: {inner: 2, row: 2, col: 2}",
        ["2d has no inner; 3d has", "tensor_parallel_mode: 3d", "{row: 2, col: 4}"],
    ),
    "an axis that 3d lacks": (
        TensorParallel("3d", mesh=DEEP),
        {},
        8,
        "tensor_parallel_mesh: {inner: 1, depth: 2, row: 2, col: 2}",
        ["3d has no depth; 2.5d has", "tensor_parallel_mode: 2.5d", "{inner: 1, row: 2, col: 4}"],
    ),
    "axes that no geometry has": (
        TensorParallel("3d", mesh=DEEP | CUBE),
        {},
        8,
        "tensor_parallel_mesh: {inner: 2, depth: 2, row: 2, col: 2}",
        ["no geometry has inner and depth and row and col", "{inner: 2, row: 2, col: 4}"],
    ),
    "depth in 2d": (
        TensorParallel("2d", 4, depth=2),
        {},
        8,
        "tensor_parallel_depth: 2",
        ["2.5d has", "no tensor_parallel_depth", "tensor_parallel_mode: 2.5d"],
    ),
    "weights over no depth": (
        TensorParallel("2d", 4, depth_weights="shard"),
        {},
        8,
        "tensor_parallel_depth_weights: shard",
        ["no depth", "tensor_parallel_depth_weights: replicate", "tensor_parallel_mode: 2.5d"],
    ),
    "weights over a depth of 1": (
        TensorParallel("2.5d", mesh={"row": 2, "col": 2}, depth_weights="shard"),
        {},
        8,
        "tensor_parallel_depth_weights: shard",
        ["tensor_parallel_depth_weights: replicate", "tensor_parallel_mesh: {depth: 2, row: 1, col: 2}"],
    ),
    "not a square": (
        TensorParallel("2d", 8, schedule="summa"),
        {},
        8,
        "tensor_parallel_schedule: summa",
        [
            "needs a square grid, and this one has row 2 × col 4",
            "tensor_parallel_schedule: gather",
            "tensor_parallel_mode: 2.5d or 3d",
            "tensor_parallel_size: 4 or 16 fits",
        ],
    ),
    "a loop in 1d": (
        TensorParallel("1d", 4, schedule="cannon"),
        {},
        8,
        "tensor_parallel_schedule: cannon",
        ["row 1 × col 4", "tensor_parallel_schedule: gather", "tensor_parallel_mode: 2d"],
    ),
    "a loop on a mesh": (
        TensorParallel("2d", mesh={"row": 2, "col": 3}, schedule="summa"),
        {},
        8,
        "tensor_parallel_schedule: summa",
        ["row 2 × col 3", "tensor_parallel_mesh: {row: 2, col: 2} or {row: 4, col: 4}"],
    ),
    "a loop with weights over depth": (
        TensorParallel("2.5d", 8, schedule="cannon", depth_weights="shard"),
        {},
        8,
        "tensor_parallel_depth_weights: shard",
        ["tensor_parallel_depth_weights: replicate", "tensor_parallel_schedule: gather"],
    ),
    "a loop over a repeated residual": (
        TensorParallel("2d", 4, schedule="summa", sequence_parallel=False),
        {},
        8,
        "sequence_parallel: false",
        ["sequence_parallel: true", "tensor_parallel_schedule: gather"],
    ),
    "a loop that keeps": (
        TensorParallel("2d", 4, schedule="summa", keep_gathered=True),
        {},
        8,
        "tensor_parallel_keep_gathered: true",
        ["tensor_parallel_keep_gathered: false", "tensor_parallel_schedule: gather"],
    ),
    "a loop in slices": (
        TensorParallel("2d", 4, schedule="cannon", slices=2),
        {},
        8,
        "tensor_parallel_slices: 2",
        ["cannon has panels of its own", "tensor_parallel_slices: 1", "tensor_parallel_schedule: gather"],
    ),
    "slices of auto": (
        TensorParallel("2d", 4, schedule="auto", slices=2),
        {},
        8,
        "tensor_parallel_slices: 2",
        ["auto chooses the slices itself", "tensor_parallel_slices: 1", "tensor_parallel_schedule: gather"],
    ),
    **{
        f"{field} off, {name}": (
            TensorParallel("2d", 4, **panels, **{field: False}),
            {},
            8,
            f"tensor_parallel_{field}: false",
            [
                f"{'a product in slices' if 'slices' in panels else name} overlaps its panels by itself",
                f"\n  tensor_parallel_{field}: true\n",
                f"\n  or tensor_parallel_{'slices: 1' if 'slices' in panels else 'schedule: gather'}",
            ],
        )
        for field in OFF
        for name, panels in PANELS.items()
    },
    "every switch off in a loop": (
        TensorParallel("2d", 4, schedule="summa", **OFF),
        {},
        8,
        "tensor_parallel_prefetch: false",
        ["summa overlaps its panels by itself\n  tensor_parallel_schedule: gather"],
    ),
    "a switch off and slices that do not divide": (
        TensorParallel("3d", 8, slices=6, overlap=False),
        {},
        8,
        "tensor_parallel_overlap: false",
        ["overlaps its panels by itself\n  tensor_parallel_slices: 1"],
    ),
    "a switch off in a loop that is not square": (
        TensorParallel("2d", 8, schedule="cannon", defer=False),
        {},
        8,
        "tensor_parallel_schedule: cannon",
        ["row 2 × col 4\n  tensor_parallel_schedule: gather"],
    ),
    "slices": (
        TensorParallel("3d", 8, slices=6),
        {},
        8,
        "tensor_parallel_slices: 6",
        ["the 16 features of hidden_size", "tensor_parallel_slices: 4 or 8", "hidden_size 48 or 72"],
    ),
    "several things at once": (
        TensorParallel("2d", 4, schedule="summa", keep_gathered=True, sequence_parallel=False),
        {"num_attention_heads": 11},
        5,
        "sequence_parallel: false",
        ["tensor_parallel_schedule: gather, a model with num_attention_heads 10 or 12"],
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_misfit_is_told_with_what_would_fit(case):
    asked, changes, batch, opening, told = MISFITS[case]
    error = refusal(asked, MODEL | changes, batch)
    assert error is not None
    message = str(error)
    assert message.startswith(f"{opening}\n  "), message
    for text in told:
        assert text in message, message
    assert len(message.splitlines()) <= 6, message
    assert list(proposals(error.hint, asked, MODEL | changes, batch))


def test_a_mode_that_there_is_not():
    with pytest.raises(UserError, match="tensor_parallel_mode: 4d\n.*not a geometry\n.*1d, 2d, 2.5d, 3d"):
        check_sizes(TensorParallel("4d", 2), MODEL, 1)


def test_nearest():
    assert nearest(10, 4) == "8 or 12" and nearest(3, 4) == "4"


# ---- Every proposal fits, and none nearer does

Sizes = tuple[TensorParallel, dict[str, int], int]


def proposals(hint: str, asked: TensorParallel, dimensions: dict[str, int], batch: int) -> Iterator[Sizes]:
    """What a message proposes, read as a person reads it: each line a few changes, each with its alternatives."""
    for line in hint.split("\n  or "):
        line = line.removesuffix(" fits this model and batch")
        tensor = asked
        if line.endswith(" instead of tensor_parallel_size"):
            line, tensor = line.removesuffix(" instead of tensor_parallel_size"), replace(asked, size=None)
        settings = [setting.removeprefix("a model with ") for setting in re.split(r", (?![^{]*\})", line)]
        for chosen in itertools.product(*(list(_alternatives(setting)) for setting in settings)):
            ask = (tensor, dimensions, batch)
            for key, value in chosen:
                ask = _changed(ask, key, value)
            yield ask


def _alternatives(setting: str) -> Iterator[tuple[str, Any]]:
    if setting == "no tensor_parallel_depth":
        yield "tensor_parallel_depth", None
        return
    match = re.fullmatch(r"([a-z_ ×]*[a-z])[: ]+(\S.*)", setting)
    assert match is not None, setting
    for value in match[2].split(" or "):
        yield match[1], value if "_mode" in match[1] else yaml.safe_load(value)


def _changed(ask: Sizes, key: str, value: Any) -> Sizes:
    tensor, dimensions, batch = ask
    key = "kv_features" if key.startswith("num_key_value_heads") else key
    if key == "micro_batch_size":
        return tensor, dimensions, value
    if key in MODEL:
        return tensor, dimensions | {key: value}, batch
    return replace(tensor, **{key.removeprefix("tensor_parallel_"): value}), dimensions, batch


def asks(count: int, seed: int) -> Iterator[Sizes]:
    """Random asks, most of which do not fit."""
    choose = random.Random(seed).choice
    for _ in range(count):
        mode = choose(["1d", "2d", "2.5d", "3d"])
        axes = [*geometry_axes(mode)] * 4 + ["inner", "depth"]
        mesh = {axis: choose([1, 2, 2, 3, 4]) for axis in {choose(axes) for _ in range(3)}}
        tensor = TensorParallel(
            mode,
            size=choose([None, 1, 2, 3, 4, 4, 6, 7, 8, 8, 9, 12, 16, 27]),
            depth=choose([None, None, None, None, None, 1, 2, 3]),
            mesh=choose([None, None, mesh]),
            depth_weights=choose(["replicate"] * 3 + ["shard"]),
            schedule=choose(["gather"] * 3 + ["summa", "cannon", "auto"]),
            slices=choose([1] * 6 + [2, 3, 4]),
            keep_gathered=choose([False] * 5 + [True]),
            sequence_parallel=choose([True] * 5 + [False]),
            **{field: choose([True] * 5 + [False]) for field in OFF},
        )
        dimensions = {
            "hidden_size": choose([24, 36, 48, 60, 64]),
            "num_attention_heads": choose([4, 6, 8, 11, 12, 12]),
            "kv_features": choose([8, 12, 24, 48, 48]),
            "intermediate_size": choose([48, 96, 96, 100]),
            "vocab_size": choose([3, 5, 29, 509, 509]),
        }
        yield tensor, dimensions, choose([1, 2, 3, 4, 4, 6, 8, 8, 12])


def test_every_proposal_fits():
    refused = proposed = 0
    for ask in asks(600, seed=1):
        error = refusal(*ask)
        if error is None:
            continue
        refused += 1
        found = list(proposals(error.hint, *ask))
        assert found, (ask, str(error))
        for other in found:
            proposed += 1
            assert other != ask
            assert refusal(*other) is None, (ask, str(error), other)
    assert refused > 400 and proposed > 1000


@pytest.mark.parametrize("mode", ["1d", "2d", "2.5d", "3d"])
@pytest.mark.parametrize("schedule", ["gather", "summa"])
def test_no_size_that_fits_is_nearer_than_those_proposed(mode, schedule):
    tried = 0
    for size, heads, batch in itertools.product(range(1, 20), (6, 11), (1, 12)):
        asked = TensorParallel(mode, size, schedule=schedule)
        dimensions = MODEL | {"num_attention_heads": heads, "hidden_size": 72}
        error = refusal(asked, dimensions, batch)
        if error is None:
            continue
        fitting = [n for n in range(2, 80) if first_misfit(Ask(replace(asked, size=n), dimensions, batch)) is None]
        nearest_two = [n for n in fitting if n < size][-1:] + [n for n in fitting if n > size][:1]
        line = next((line for line in error.hint.split("\n  or ") if line.startswith("tensor_parallel_size")), "")
        told = [int(n) for n in re.findall(r"\d+", line)]
        alone = told == [1] and error.hint.endswith(line) and not nearest_two  # no tensor parallelism comes last
        assert told == nearest_two or alone, (size, heads, batch, str(error))
        tried += 1
    assert tried > 5


def test_one_rank_is_proposed_only_where_nothing_else_fits():
    """A person who asked for several wants several."""
    for asked, batch in ((TensorParallel("3d", 4), 4), (TensorParallel("2d", mesh={"col": 2}, schedule="cannon"), 2)):
        error = refusal(asked, MODEL, batch)
        assert error is not None and not re.search("size: 1|col: 1}", error.hint), error
    first = refusal(TensorParallel("3d", 4), MODEL, 4).hint.partition("\n")[0]
    assert first.startswith("tensor_parallel_mesh: ") and first.count("2") == 2, "as many ranks as were asked for"
    prime = MODEL | {"num_attention_heads": 1, "kv_features": 1, "intermediate_size": 1, "hidden_size": 1}
    assert refusal(TensorParallel("1d", 2), prime, 1).hint.endswith("tensor_parallel_size: 1 fits this model and batch")


# ---- The rules are those of the code: what fits runs on every rank, what does not fails on some


@pytest.fixture
def alone(monkeypatch):
    """Any rank of any mesh in this process: collectives have the shapes of theirs, and nothing in them."""
    monkeypatch.setattr(Mesh, "device_mesh", None)
    monkeypatch.setattr(Mesh, "_new_process_group", lambda mesh, axes: None)
    monkeypatch.setattr("tessera.core.mesh._take_default_timeout", lambda group: None)
    monkeypatch.setattr(collectives, "_issue", lambda kind, group, whole, result, *_, **__: collectives.Pending(result))


def runs_on(rank: int, tensor: TensorParallel, config: ModelConfig, batch: int) -> None:
    """A forward and backward of a model on one rank; raises where parts do not fit each other or are not all alike."""
    mesh = Mesh(tensor.axes, rank=rank)
    schedule = Schedule(tensor.schedule, tensor.slices, keep=tensor.keep_gathered)
    parallel = Parallel(
        mesh,
        residual_layout(tensor.sequence_parallel, schedule.name),
        schedule=schedule,
        attention=attention_layout(mesh.sizes, batch, config.dimensions),
        weights_over=("depth", "row") if tensor.depth_weights == "shard" else ("row",),
        context=Context(joined=joins_rows(mesh.sizes, batch, config.dimensions)),
    )
    model = Decoder(config, parallel)
    for name, _, spec in named_specs(model):
        for size, axes in zip(spec.shape, spec.cuts, strict=True):
            if size != config.vocab_size and size % mesh.size(axes):
                raise ValueError(f"{name} {spec.shape} does not divide over {axes}")
    multiple = length_multiple(batch, parallel.residual, mesh)
    ids = torch.zeros(batch, -(-3 // multiple) * multiple, dtype=torch.int64)
    model(model.cut(MicroBatch(ids, ids, ids.numel())), 1.0).backward()


def models(count: int, seed: int) -> Iterator[tuple[TensorParallel, ModelConfig, int]]:
    """Random meshes whose keys agree with each other, and models, of which many do not fit."""
    choose = random.Random(seed).choice
    for _ in range(count):
        mode = choose(["1d", "2d", "2.5d", "3d", "3d"])
        mesh = {axis: choose([1, 2, 2, 3]) for axis in geometry_axes(mode)}
        schedule = choose(["gather", "gather", "summa", "cannon"])
        gathered = schedule == "gather"
        tensor = TensorParallel(
            mode,
            mesh=mesh,
            depth_weights=choose(["replicate", "shard"]) if gathered and mesh.get("depth", 1) > 1 else "replicate",
            schedule=schedule,
            slices=choose([1, 1, 2, 3]) if gathered else 1,
            keep_gathered=gathered and choose([True, False]),
            sequence_parallel=not gathered or choose([True, False]),
        )
        kv_heads = choose([1, 2, 3, 6])
        config = ModelConfig(
            "llama",
            vocab_size=choose([4, 31, 31, 31]),
            hidden_size=choose([24, 36, 36, 72]),
            num_layers=1,
            num_heads=kv_heads * choose([1, 2, 4]),
            num_kv_heads=kv_heads,
            head_dim=choose([4, 6, 12]),
            ffn_size=choose([36, 36, 40]),
            max_positions=16,
            rope=choose([None, RopeConfig()]),
            norm=choose(["rms", "layer"]),
            qkv_bias=choose([True, False]),
            attention_out_bias=choose([True, False]),
            mlp_bias=choose([True, False]),
            head_bias=choose([True, False]),
            tied=choose([True, False]),
        )
        yield tensor, config, choose([1, 2, 4, 6, 6, 12])


REASONS = {
    "square": "grid",
    "hidden_size =": "hidden",
    "of the model": "col",
    "a rank holds": "slices",
    "vocabulary": "vocabulary",
}


def test_what_fits_runs_and_what_does_not_fails(alone):
    outcomes: Counter[str] = Counter()
    for tensor, config, batch in models(450, seed=2):
        error = refusal(tensor, config.dimensions, batch)
        failure = None
        for rank in range(math.prod(tensor.axes.values())):
            try:
                runs_on(rank, tensor, config, batch)
            except Exception as raised:
                failure = raised
                break
        assert (failure is None) == (error is None), (tensor, config, batch, error, failure)
        outcomes[error is None or next(kind for words, kind in REASONS.items() if words in error.reason)] += 1
    assert outcomes[True] > 100 and all(outcomes[kind] >= 3 for kind in REASONS.values()), outcomes
