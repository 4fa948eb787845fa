"""Which layouts are verified, and the small models and batches that stand for the real ones."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tessera.config.load import make_config
from tessera.core.axes import MODEL_AXES
from tessera.core.errors import UserError
from tessera.layout.streams import HIDDEN, attention_layout
from tessera.models.config import ModelConfig
from tessera.models.hub import read_model_config
from tessera.nn.rope import RopeConfig
from tessera.sizes.remedies import check_sizes
from tessera.train.settings import fitting_layout
from tessera.verify.cases import cases_of, every_case
from tessera.verify.problem import LENGTH, small_batch, small_model
from verify.verify_cases import GPT2, save_models, settings

BIG = ModelConfig("llama", 32000, 4096, 32, 32, 8, 128, 14336, 8192, rope=RopeConfig(), tied=True, qkv_bias=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def meshes(world):
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    for inner in divisors:
        for depth in divisors:
            for row in divisors:
                if world % (inner * depth * row) == 0:
                    sizes = (inner, depth, row, world // (inner * depth * row))
                    yield dict(zip(MODEL_AXES, sizes, strict=True))


def cut(number, ranks):
    """Where a number of heads divides, and where a head is cut."""
    return [number % n == 0 for n in range(1, ranks + 1) if ranks % n == 0]


@pytest.mark.parametrize("world", [2, 4, 6, 8, 12])
@pytest.mark.parametrize("heads, kv_heads", [(32, 8), (48, 48), (24, 1), (24, 3), (96, 12)])
def test_a_small_model_keeps_what_layouts_can_get_wrong(world, heads, kv_heads):
    model = replace(BIG, num_heads=heads, num_kv_heads=kv_heads)
    for sizes in meshes(world):
        small = small_model(model, [sizes], slices=2)
        ways = sizes["inner"] * sizes["col"]
        assert small.num_heads * kv_heads == small.num_kv_heads * heads
        assert cut(small.num_kv_heads, ways) == cut(kv_heads, ways)
        assert cut(small.num_heads, ways) == cut(heads, ways)
        assert cut(small.dimensions["kv_features"], ways) == cut(model.dimensions["kv_features"], ways)
        assert small.head_dim % 2 == 0
        assert sizes["col"] == 1 or small.vocab_size % sizes["col"]
        assert small.vocab_size < 300 and small.num_layers == 2 and small.hidden_size <= 48
        assert (small.tied, small.qkv_bias, small.rope) == (model.tied, model.qkv_bias, model.rope)


def test_learned_positions_end_where_padding_begins():
    small = small_model(replace(BIG, rope=None), [dict.fromkeys(MODEL_AXES, 1) | {"col": 2}], 1)
    assert small.max_positions == LENGTH


DIVIDING = {"num_attention_heads": 0, "kv_features": 0}  # by any number


@pytest.mark.parametrize("world", [2, 4, 6, 8, 12])
def test_small_batches_fit_by_one_way_to_cut_attention_only_and_are_padded(world):
    for sizes in meshes(world):
        for by_heads in (False, True) if sizes["inner"] > 1 else (False,):
            batch = small_batch(sizes, by_heads)
            assert (attention_layout(sizes, batch, DIVIDING) == HIDDEN) != by_heads
            assert batch % (sizes["depth"] * sizes["row"]) == 0
            cut_residual = sizes["depth"] * sizes["row"] * sizes["col"]
            assert batch * LENGTH % cut_residual or sizes["col"] == 1 or sizes["inner"] > 1


SHARING = "every layout whose ranks share sequences"


def every(model, world, **keys):
    config, _ = make_config(settings(model, **keys))
    return every_case(config, read_model_config(Path(model)), world, full=False)


@pytest.mark.parametrize("world", [2, 4, 6, 8])
def test_every_layout_of_a_world_is_there_once_and_fits(models, world):
    cases, unfit = every(models["gpt2"], world)
    names = [case.name for case in cases] + list(unfit)
    assert len(set(names)) == len(names)
    for case in cases:
        assert math.prod(case.config.axes.values()) == world
        check_sizes(case.config.tensor_parallel, case.problem.model.dimensions, case.problem.batch)
    assert "drops attention probabilities" in unfit.pop(SHARING)
    found = {tuple(case.config.axes.values()) for case in cases}
    geometric = [sizes for sizes in meshes(world) if sizes["inner"] == 1 or sizes["depth"] == 1]
    assert found == {tuple(sizes.values()) for sizes in geometric if GPT2["n_head"] % sizes["col"] == 0}
    if world == 4:
        grid = [case.name.partition(", ")[2] for case in cases if case.name.startswith("2d row 2 × col 2")]
        assert grid == ["gather", "slices 2", "summa", "cannon"]
        assert not unfit


@pytest.mark.parametrize("switch", ["prefetch", "defer", "overlap"])
def test_switches_of_the_product_in_one_piece_take_no_layout_away(models, switch):
    cases, unfit = every(models["gpt2"], 4, **{f"tensor_parallel_{switch}": False})
    assert list(unfit) == [SHARING]
    for case in cases:
        schedule = case.config.schedule
        assert getattr(schedule, switch) == schedule.in_panels


def test_layouts_that_the_model_does_not_fit_are_named(models):
    cases, unfit = every(models["llama"], 3)
    assert {case.config.axes["col"] for case in cases} == {1}
    assert "1d ulysses 3, gather" in unfit
    assert "3 ways, which does not divide" in unfit["1d col 3, gather"]


def test_layouts_that_share_sequences_are_there_with_each_transport(models):
    cases, unfit = every(models["llama"], 4)
    shared = [case for case in cases if case.problem.shared]
    assert [case.name.replace(", gather", "") for case in shared] == [
        "2d row 2 × col 2, sequences over row by exchange",
        "2d row 2 × col 2, sequences over row by ring",
        "1d exchange 2 × col 2",
        "1d ring 2 × col 2",
        "1d ulysses 2 × col 2",
        "2d exchange 2 × row 2, sequences over row",
        "2d ring 2 × row 2, sequences over row",
        "2d ulysses 2 × row 2, sequences over row by exchange",
        "1d exchange 4",
        "1d ring 4",
        "1d exchange 2 × ulysses 2",
        "1d ring 2 × ulysses 2",
        "1d ulysses 4",
    ]
    assert not unfit
    for case in shared:  # no rank's share is whole rows: all send and receive
        rows = case.problem.batch
        assert rows % math.prod(case.config.axes[axis] for axis in ("depth", "row")) or case.config.axes["row"] == 1
        assert math.gcd(rows, case.config.mesh_sizes["ring"] * case.config.axes["row"]) == 1


@pytest.mark.parametrize("heads, kv_heads", [(32, 8), (48, 48), (24, 1), (6, 3), (12, 2)])
def test_the_miniature_trades_heads_as_the_model_does(models, heads, kv_heads):
    model = replace(BIG, num_heads=heads, num_kv_heads=kv_heads)
    for size, ulysses, col, chunks in itertools.product((2, 4, 8), (1, 2, 4), (1, 2), (1, 2)):
        local = heads // col
        if heads % col or local % ulysses or (local // ulysses) % chunks or size % ulysses or chunks > ulysses:
            continue
        keys = {"context_parallel_size": size, "ulysses_size": ulysses, "ulysses_chunks": chunks}
        config, _ = make_config(settings(models["llama"], **keys, tensor_parallel_size=col))
        (case,) = cases_of(config, model, full=False)
        small = case.problem.model
        assert fitting_layout(case.config, small).ulysses_size == ulysses  # it fits
        again = [math.gcd(ulysses, max(1, each.num_kv_heads // col)) for each in (model, small)]
        assert again[0] == again[1], "kv heads are repeated as often"


def test_auto_stands_for_every_schedule_there_is(models):
    keys = {"tensor_parallel_mode": "2d", "tensor_parallel_size": 4, "tensor_parallel_schedule": "auto"}
    config, _ = make_config(settings(models["llama"], **keys))
    cases = cases_of(config, read_model_config(Path(models["llama"])), full=False)
    chosen_from = ["gather", "slices 2", "slices 4", "slices 8", "summa", "cannon"]
    assert [str(case.config.schedule) for case in cases] == chosen_from
    config = config.model_copy(update={"context_parallel_size": 2})
    (case,) = cases_of(config, read_model_config(Path(models["llama"])), full=False)
    assert str(case.config.schedule) == "gather"


def test_at_full_size_nothing_is_small(models):
    keys = {"tensor_parallel_size": 2, "sequence_len": 60, "gradient_accumulation_steps": 8}
    config, _ = make_config(settings(models["llama"], **keys))
    model = read_model_config(Path(models["llama"]))
    (case,) = cases_of(config, model, full=True)
    assert case.problem.model == model
    assert (case.problem.batch, case.problem.length, case.problem.micro_batches) == (4, 60, 2)


def test_a_layout_that_does_not_fit_is_a_mistake(models):
    config, _ = make_config(settings(models["llama"], tensor_parallel_size=5))
    with pytest.raises(UserError, match="tensor_parallel_size: 5"):
        cases_of(config, read_model_config(Path(models["llama"])), full=False)
