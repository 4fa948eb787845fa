"""Packed runs against transformers, which sees every sample alone; resumed; and each key of packing heeded."""

import json
import re
from typing import Any

import numpy as np
import pytest

from support.pool import pool
from tessera.checkpoint import folder as checkpoints
from tessera.config.schema import TrainConfig
from tessera.data.epochs import Packed, Singles
from tessera.plan.flops import step_flops
from tessera.train.run import model_of
from train.on_rank import said_on_rank
from train.packing_on_rank import counted_on_rank, shapes_on_rank
from train.runs import Workshop, forget_last, metrics, run
from train.test_parity import SAME, check, worst_difference

LENGTH, ROWS = 32, 4
PACKED = {"sample_packing": True, "sequence_len": LENGTH, "micro_batch_size": 2, "gradient_accumulation_steps": 2}
LAYOUTS = {
    "1d 2": {"tensor_parallel_size": 2},
    "2d 2×2": {"tensor_parallel_mode": "2d", "tensor_parallel_size": 4},
    "2.5d 2×1×2": {"tensor_parallel_mode": "2.5d", "tensor_parallel_size": 4},
    "3d 2×1×2": {"tensor_parallel_mode": "3d", "tensor_parallel_mesh": {"inner": 2, "row": 1, "col": 2}},
    "fsdp 2 × tp 2": {"dp_shard_size": 2, "tensor_parallel_size": 2, "micro_batch_size": 1},
}
TIED, UNTIED = "llama 64 tied", "llama 64"
ALWAYS = {("2d 2×2", "gpt2 64"), ("fsdp 2 × tp 2", "gpt2 64")}
"""Beside the tied model in every layout: positions that are learnt, where rows are cut among ranks."""


class Rows:
    """The lengths of the workshop's rows, as they lie in their file."""

    def __init__(self, workshop: Workshop) -> None:
        rows = [json.loads(line) for line in workshop.rows.read_text().splitlines()]
        self.all = np.array([len(row["input_ids"]) for row in rows])

    def __len__(self) -> int:
        return len(self.all)

    def lengths(self, indices: Any) -> Any:
        return self.all[indices]


def rows_of(workshop: Workshop) -> Packed:
    """The workshop's rows packed in file order."""
    rows: Any = Rows(workshop)
    return Packed(rows, LENGTH, 42, shuffle=False)


def steps_of(workshop: Workshop, steps: int) -> list[list[int]]:
    """The samples of each step of ROWS packed rows, in file order."""
    epochs = rows_of(workshop)
    return [[sample for row in range(ROWS) for sample in epochs.samples(step * ROWS + row)] for step in range(steps)]


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        pytest.param(layout, case, marks=[] if case == TIED or (layout, case) in ALWAYS else [pytest.mark.slow])
        for layout in LAYOUTS
        for case in (TIED, UNTIED, "gpt2 64")
    ],
)
def test_a_packed_run_equals_the_plain_loop_over_single_samples(workshop, plain_packed, tmp_path, layout, case):
    settings = workshop.settings(case, tmp_path / "run", **PACKED | LAYOUTS[layout])
    check(settings, run(settings), plain_packed(case))


def test_an_untied_packed_run_equals_the_plain_loop(workshop, plain_packed, tmp_path):
    settings = workshop.settings(UNTIED, tmp_path / "run", **PACKED | LAYOUTS["1d 2"])
    found = run(settings)
    check(settings, found, plain_packed(UNTIED))
    rows = rows_of(workshop).rows_in(0)
    assert [m["epoch"] for m in found] == [pytest.approx(ROWS * (step + 1) / rows, abs=1e-6) for step in range(5)]
    learnt = np.cumsum([workshop.targets(samples) for samples in steps_of(workshop, 5)])
    assert [m["tokens"] for m in found] == learnt.tolist()


def test_a_run_that_does_not_pack_would_be_seen(workshop, plain_packed, tmp_path):
    settings = workshop.settings(TIED, tmp_path / "run", **PACKED | {"sample_packing": False})
    assert worst_difference(run(settings), plain_packed(TIED)) > 100 * SAME


def test_the_first_lines_say_how_full_rows_are(workshop: Workshop, tmp_path):
    settings = workshop.settings(TIED, tmp_path / "run", **PACKED | {"max_steps": None})
    (said,) = pool(1).run(said_on_rank, settings)
    tokens = int(Rows(workshop).all.sum())
    found = re.search(r"packing: 26 samples in (\d+) rows of 32, (\d+\.\d)% full", said)
    assert found is not None, said
    rows = int(found[1])
    assert -(-tokens // LENGTH) <= rows < 26 and float(found[2]) == pytest.approx(
        100 * tokens / LENGTH / rows, abs=0.05
    )
    steps = -(-rows // ROWS)
    assert f"{steps} steps of 4 rows" in said and "= 4 rows" in said
    last = metrics(settings)[-1]
    assert (last["step"], last["epoch"], last["tokens"]) == (steps, 1.0, workshop.targets())


def test_mfu_counts_what_each_document_sees_of_itself(workshop: Workshop, tmp_path):
    own = {"device_peak_tflops": 0.5, "max_steps": 2}
    settings = workshop.settings(TIED, tmp_path / "run", **PACKED | own)
    found, model, lengths = run(settings), model_of(TrainConfig.model_validate(settings)), Rows(workshop).all
    for m, samples in zip(found, steps_of(workshop, 2), strict=True):
        padding = ROWS * LENGTH - lengths[samples].sum()
        documents = sum(step_flops(model, [int(length)]) for length in lengths[samples])
        done, least = m["mfu"] * 0.5e12 * m["step_seconds"], documents + padding * step_flops(model, [1])
        # padding is a document in each row: more than that of tokens alone, and less than that of whole rows
        assert least <= done * (1 + 1e-9) < step_flops(model, [LENGTH] * ROWS)
        assert done - least < step_flops(model, [int(padding)])
        if not padding:
            assert done == pytest.approx(documents, rel=1e-9)


@pytest.mark.parametrize(
    ("keys", "epochs"), [({"max_steps": None, "num_epochs": 2.5}, 3), ({"max_steps": 2}, 1)], ids=str
)
def test_ranks_share_the_windows_that_are_counted_at_the_start(workshop: Workshop, tmp_path, keys, epochs):
    """26 samples are five windows of five; the steps are those that one rank counts."""
    settings = workshop.settings(TIED, tmp_path / "run", **PACKED | {"shuffle": True} | keys)
    ((whole, rows, steps),) = pool(1).run(counted_on_rank, settings)
    assert whole == [(epoch, window) for epoch in range(epochs) for window in range(5)]
    shared = settings | {"tensor_parallel_size": 2}
    (first, *others), (second, *same) = pool(2).run(counted_on_rank, shared)
    assert others == same == [rows, steps] and not {*first} & {*second}
    assert sorted(first + second) == whole and len(second) == 2 * epochs
    if epochs == 3:
        assert steps == -(-(rows[2] + -(-(rows[3] - rows[2]) // 2)) // ROWS)


# ---- Going on


LONG = PACKED | {"shuffle": True, "max_steps": 7, "save_steps": 3}  # into a third epoch
DROPOUT = "gpt2 64 dropout"


@pytest.fixture(scope="module")
def whole(workshop, tmp_path_factory) -> dict[str, Any]:
    """A packed run with dropout on two data ranks, never interrupted."""
    settings = workshop.settings(DROPOUT, tmp_path_factory.mktemp("whole") / "run", **LONG, dp_shard_size=2)
    settings["micro_batch_size"] = 1
    run(settings)
    forget_last(settings)
    return settings


@pytest.mark.parametrize("ranks, micro, times", [(2, 1, 2), (1, 2, 2), (1, 1, 4), (4, 1, 1)])
def test_a_packed_run_goes_on_at_another_data_parallel_size(whole, tmp_path, ranks, micro, times):
    """The rows of each step are the same, and with them the masks of dropout and the losses."""
    changes = {"dp_shard_size": ranks, "micro_batch_size": micro, "gradient_accumulation_steps": times}
    named = {"resume_from_checkpoint": f"{whole['output_dir']}/checkpoint-3", "output_dir": str(tmp_path / "run")}
    found = run(whole | changes | named)
    expected = metrics(whole)[3:]
    assert [m["step"] for m in found] == [4, 5, 6, 7]
    for now, then in zip(found, expected, strict=True):
        assert (now["tokens"], now["epoch"]) == (then["tokens"], then["epoch"])
        assert now["loss"] == pytest.approx(then["loss"], rel=SAME)
        assert now["grad_norm"] == pytest.approx(then["grad_norm"], rel=SAME)


@pytest.mark.parametrize("before", [False, True])
def test_packing_that_changes_on_resume_begins_with_the_next_epoch(workshop: Workshop, tmp_path, before):
    settings = workshop.settings(TIED, tmp_path / "run", **PACKED | {"max_steps": 1, "save_strategy": "steps"})
    run(settings | {"sample_packing": before})
    named = {"resume_from_checkpoint": True, "max_steps": 2, "sample_packing": not before}
    (said,) = pool(1).run(said_on_rank, settings | named)
    left = rows_of(workshop).rows_in(0) - ROWS
    what = f"{left} rows of packed samples" if before else f"{26 - ROWS} samples"
    assert f"sample_packing has changed: the run goes on with epoch 2, {what} are left out" in said
    *_, last = metrics(settings)
    rows = 26 if before else left + ROWS
    assert last["epoch"] == pytest.approx(1 + ROWS / rows, abs=1e-6)
    file = tmp_path / "run/checkpoint-2/state.json"
    state = json.loads(file.read_text())
    assert (state["order"], state["unit"]) == (2, "sample" if before else "row")


def test_packing_that_changes_in_the_last_epoch_is_refused(workshop: Workshop, tmp_path):
    settings = workshop.settings(TIED, tmp_path / "run", **PACKED | {"max_steps": 1, "save_strategy": "steps"})
    run(settings)
    changes = {"resume_from_checkpoint": True, "max_steps": None, "sample_packing": False}
    (said,) = pool(1).run(said_on_rank, settings | changes)
    assert "UserError: sample_packing: false" in said and "this is the last one" in said and "num_epochs" in said


def test_a_run_of_the_order_before_goes_on_in_it(workshop: Workshop, tmp_path):
    """Its state says neither order nor unit."""
    settings = workshop.settings(TIED, tmp_path / "run", max_steps=3, save_steps=1, shuffle=True)
    run(settings | {"max_steps": 1})
    file = tmp_path / "run/checkpoint-1/state.json"
    state = json.loads(file.read_text())
    assert (state.pop("order"), state.pop("unit"), state["format"]) == (2, "sample", 3)
    file.write_text(json.dumps(state | {"format": 2}))
    names = [path.name for path in file.parent.iterdir() if path.name != "SHA256SUMS"]
    checkpoints.write_sums(file.parent, checkpoints.sums_of(file.parent, names))
    run(settings | {"resume_from_checkpoint": True})
    state = json.loads((tmp_path / "run/checkpoint-3/state.json").read_text())
    assert (state["order"], state["unit"], state["format"]) == (1, "sample", 3)
    orders = {version: Singles(26, 42, True, version) for version in (1, 2)}
    taken = [[order.samples(row)[0] for row in range(6, 12)] for order in orders.values()]
    before, now = (workshop.targets(samples) for samples in taken)
    first, second, _ = (line["tokens"] for line in metrics(settings))
    assert second - first == before != now


# ---- Keys


EVALUATED = PACKED | {"val_set_size": 9, "max_steps": 2}


@pytest.mark.parametrize("key, packs", [({}, True), ({"eval_sample_packing": False}, False)], ids=str)
def test_rows_held_out_are_packed_unless_told_otherwise(workshop: Workshop, tmp_path, key, packs):
    settings = workshop.settings(TIED, tmp_path / "run", **EVALUATED, **key)
    (shapes,) = pool(1).run(shapes_on_rank, settings)
    assert all(shape == (2, LENGTH) and documents for shape, documents in shapes["train"])
    assert all(documents == packs for _, documents in shapes["eval"])
    assert len(shapes["eval"]) == 5 if not packs else len(shapes["eval"]) < 4


def test_rows_held_out_are_packed_alone(workshop: Workshop, tmp_path):
    keys = EVALUATED | {"sample_packing": False, "eval_sample_packing": True}
    (shapes,) = pool(1).run(shapes_on_rank, workshop.settings(TIED, tmp_path / "run", **keys))
    assert not any(documents for _, documents in shapes["train"])
    assert all(documents and shape == (2, LENGTH) for shape, documents in shapes["eval"])


def test_packing_rows_held_out_leaves_their_loss(workshop: Workshop, tmp_path):
    losses = []
    for packing in (True, False):
        settings = workshop.settings(TIED, tmp_path / str(packing), **EVALUATED, eval_sample_packing=packing)
        losses.append(run(settings)[-1]["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    "key, length", [({}, 13), ({"pad_to_sequence_len": False}, 13), ({"pad_to_sequence_len": True}, 16)]
)
def test_rows_are_padded_to_sequence_len_when_asked(workshop: Workshop, tmp_path, key, length):
    settings = workshop.settings(TIED, tmp_path / "run", val_set_size=3, **key)
    (shapes,) = pool(1).run(shapes_on_rank, settings)
    assert {shape for shape, _ in shapes["train"]} == {(3, length)}
    assert not key.get("pad_to_sequence_len") or shapes["eval"] == [((3, 16), False)]
