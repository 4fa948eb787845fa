"""Three steps of the trainer on data axes, alone and beside every geometry, against a plain loop over all the rows."""

import json
from typing import Any

import pytest

from tessera.config.schema import TrainConfig
from tessera.data.samples import open_samples
from train.runs import THREE_STEPS, Workshop, run
from train.test_parity import check


def data(shard: int = 1, replicate: int = 1, **keys: Any) -> dict[str, Any]:
    return {"dp_shard_size": shard, "dp_replicate_size": replicate, **keys}


def tensor(mode: str, **axes: int) -> dict[str, Any]:
    return {"tensor_parallel_mode": mode, "tensor_parallel_mesh": axes}


LAYOUTS = {
    "fsdp 2": data(2),
    "fsdp 2 × tp 2": data(2, tensor_parallel_size=2),
    "hsdp 2×2": data(2, 2),
    "hsdp 2×2 × tp 2": data(2, 2, tensor_parallel_size=2),
    "fsdp 2 × 2d 2×2": data(2, **tensor("2d", row=2, col=2)),
    "fsdp 2 × 2.5d 2×1×2": data(2, **tensor("2.5d", depth=2, row=1, col=2)),
    "fsdp 2 × 3d 2×1×2": data(2, **tensor("3d", inner=2, row=1, col=2)),
}
MODELS = ("llama 64", "llama 64 tied", "gpt2 64")
SWITCHES = {
    "weights kept": {"reshard_after_forward": False},
    "offload": {"offload_params": True},
    "all at once": {"offload_params": True, "forward_prefetch": True, "auto_wrap_policy": "NO_WRAP"},
}
ROWS = 8  # of one micro-batch, over all data ranks


def settings_of(workshop: Workshop, folder: Any, layout: str, model: str, **changes: Any) -> dict[str, Any]:
    keys = THREE_STEPS | LAYOUTS[layout] | changes
    ranks = keys["dp_shard_size"] * keys["dp_replicate_size"]
    return workshop.settings(model, folder, micro_batch_size=ROWS // ranks, **keys)


@pytest.mark.parametrize("model", [pytest.param(MODELS[0], marks=pytest.mark.slow), MODELS[1]])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_equals_the_plain_loop(workshop: Workshop, plain, tmp_path, layout, model):
    """Two micro-batches a step; losses, gradient norms, and the weights that are handed out."""
    settings = settings_of(workshop, tmp_path / "run", layout, model)
    check(settings, run(settings), plain(model, **THREE_STEPS, micro_batch_size=ROWS))


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("layout", ["fsdp 2", pytest.param("hsdp 2×2", marks=pytest.mark.slow)])
def test_switches_of_fsdp_change_no_number(workshop: Workshop, plain, tmp_path, layout, switch):
    settings = settings_of(workshop, tmp_path / "run", layout, MODELS[2], fsdp_config=SWITCHES[switch])
    check(settings, run(settings), plain(MODELS[2], **THREE_STEPS, micro_batch_size=ROWS))


def test_a_last_step_that_the_rows_do_not_fill_equals_the_plain_loop(workshop: Workshop, plain, tmp_path):
    """26 rows, 16 a step: of the second step's rows the data ranks have unequal shares, some none."""
    settings = settings_of(workshop, tmp_path / "run", "hsdp 2×2", "llama 64", max_steps=None, warmup_steps=0)
    settings["learning_rate"] = 1e-4
    check(settings, run(settings), plain("llama 64", micro_batch_size=ROWS, max_steps=None, warmup_steps=0,
                                         learning_rate=1e-4))  # fmt: skip


def test_the_held_out_loss_does_not_depend_on_the_layout(workshop: Workshop, tmp_path):
    """7 rows over 4 data ranks: the last has one of padding."""
    losses = []
    for place, layout in enumerate(("fsdp 2", "hsdp 2×2")):
        settings = settings_of(workshop, tmp_path / f"{place}", layout, "llama 64", max_steps=1, val_set_size=7)
        losses.append(run(settings)[-1]["eval_loss"])
        assert len(open_samples(tmp_path / f"{place}" / "prepared", "eval")) == 7
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_bf16_gathers_weights_in_bf16_and_sums_in_float32(workshop: Workshop, plain, tmp_path):
    settings = settings_of(
        workshop, tmp_path / "run", "fsdp 2", "llama 64", bf16="auto", fsdp_config={"mixed_precision_policy": "bf16"}
    )
    found, want = run(settings), plain("llama 64", **THREE_STEPS, micro_batch_size=ROWS)
    assert [m["loss"] for m in found] == pytest.approx(want.losses, rel=0.02)
    assert found[0]["loss"] != pytest.approx(want.losses[0], rel=1e-6), "this was not bfloat16"
    moved = {c["kind"]: c["bytes"] for c in json.loads((tmp_path / "run" / "summary.json").read_text())["collectives"]
             if c["axis"] == "shard"}  # fmt: skip
    layers = (moved["all_gather"] / 2, moved["reduce_scatter"] / 4)  # elements; layers twice, in both micro-batches
    assert 2 * layers[1] < layers[0] < 4 * layers[1]


def test_processes_fill_in_the_shards():
    config = TrainConfig.model_validate({"base_model": "x", "datasets": [{"path": "y"}], "tensor_parallel_size": 2})
    assert config.filled_in(8).mesh_sizes["shard"] == 4 and config.filled_in(8).world_size == 8
    assert config.filled_in(None).world_size == 2
    with pytest.raises(Exception, match="does not divide by .* = 2\n.*2 or 4 processes"):
        config.filled_in(3)
