"""Runs whose sequences lie over ranks, against transformers: loss, gradient norm, and the weights handed out."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tessera.config.load import make_config
from tessera.core.errors import UserError
from tessera.train.run import resolve
from train.runs import THREE_STEPS, Workshop, run
from train.test_packing import PACKED
from train.test_parity import check

SLOW = pytest.mark.slow
ROWS = {"micro_batch_size": 4, "gradient_accumulation_steps": 1}
TWO = {"tensor_parallel_mode": "2d", "tensor_parallel_mesh": {"row": 2, "col": 2}}
ONE_ROW = {"micro_batch_size": 1, "gradient_accumulation_steps": 4}


def context(size: int, mode: str, **keys: Any) -> dict[str, Any]:
    return {"context_parallel_size": size, "context_parallel_mode": mode, **keys}


WAYS = {
    "ring 2": context(2, "ring"),
    "ring 4": context(4, "ring"),
    "exchange 2": context(2, "exchange"),
    "exchange 4": context(4, "exchange"),
    "ulysses 2": context(2, "ulysses"),
    "ulysses 2 × ring 2": context(4, "ring", ulysses_size=2),
    "ulysses 2 × exchange 2": context(4, "exchange", ulysses_size=2),
}
BESIDE: dict[str, dict[str, Any]] = {
    "alone": {},
    "tp 2": {"tensor_parallel_size": 2},
    "fsdp 2": {"dp_shard_size": 2},
    "2d 2×2": TWO,
    "2d 2×2, one row": TWO | ONE_ROW,
}
ALWAYS = {  # each way with each wiring once
    ("ring 2", "2d 2×2, one row", "single"),
    ("exchange 2", "fsdp 2", "packed"),
    ("ulysses 2", "tp 2", "packed"),
    ("ulysses 2 × ring 2", "alone", "single"),
    ("ulysses 2 × exchange 2", "alone", "packed"),
    ("exchange 4", "alone", "single"),
}


def layouts() -> list[Any]:
    """Every way alone, beside tensor and sharded data parallelism; of two ranks also in 2d, with one row and four."""
    found = []
    for way, keys in WAYS.items():
        for beside in BESIDE:
            if "2d" in beside and keys["context_parallel_size"] > 2:
                continue
            for rows in ("single", "packed"):
                marks = [] if (way, beside, rows) in ALWAYS else [SLOW]
                found.append(pytest.param(way, beside, rows, marks=marks))
    return found


def settings_of(workshop: Workshop, model: str, folder: Any, rows: str, keys: dict[str, Any]) -> dict[str, Any]:
    """A run that takes the rows of one that has `rows` on one data rank; FSDP ranks have their share of them."""
    base = PACKED if rows == "packed" else ROWS
    keys = base | keys
    share = keys["micro_batch_size"] // keys.get("dp_shard_size", 1)
    return workshop.settings(model, folder, **keys | {"micro_batch_size": share})


@pytest.mark.parametrize("model", ["llama 64", pytest.param("llama 64 tied", marks=SLOW)])
@pytest.mark.parametrize("way, beside, rows", layouts())
def test_a_run_equals_the_plain_loop(workshop: Workshop, plain, plain_packed, tmp_path, way, beside, rows, model):
    """Five steps, into a second epoch."""
    settings = settings_of(workshop, model, tmp_path / "run", rows, WAYS[way] | BESIDE[beside])
    check(settings, run(settings), plain_packed(model) if rows == "packed" else plain(model, **ROWS))


def test_the_list_covers_each_way_and_each_wiring():
    assert {way.rstrip(" 0123456789") for way, _, _ in ALWAYS} == {way.rstrip(" 0123456789") for way in WAYS}
    assert {rows for _, _, rows in ALWAYS} == {"single", "packed"}
    assert {beside for _, beside, _ in ALWAYS} >= {"alone", "tp 2", "fsdp 2", "2d 2×2, one row"}


@pytest.mark.parametrize("packed", [True, False])
def test_the_held_out_loss_does_not_depend_on_the_layout(workshop: Workshop, tmp_path, packed):
    """7 rows held out, of which the last micro-batch has fewer."""
    losses = []
    for place, keys in enumerate(({}, WAYS["ring 2"], TWO | ONE_ROW)):
        own = {"max_steps": 1, "val_set_size": 7, "eval_sample_packing": packed, "sequence_len": 32}
        settings = workshop.settings("llama 64", tmp_path / f"{place}", **ROWS | own | keys)
        losses.append(run(settings)[-1]["eval_loss"])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)


def refusal(workshop: Workshop, model: str, keys: dict[str, Any]) -> UserError:
    """Why a run of the model is refused before anything starts."""
    config = make_config(workshop.settings(model, workshop.rows.parent / "never", **ROWS | keys))[0]
    with pytest.raises(UserError) as error:
        resolve(config)
    assert not (workshop.rows.parent / "never").exists()
    return error.value


def test_what_attention_across_ranks_cannot_do_is_refused_before_a_process_starts(workshop: Workshop):
    dropped = refusal(workshop, "gpt2 64 dropout", WAYS["ring 2"])
    assert dropped.key == "context_parallel_size" and "attn_pdrop" in dropped.hint
    shared = refusal(workshop, "gpt2 64 dropout", TWO | ONE_ROW)
    assert shared.key == "micro_batch_size" and "micro_batch_size: 2" in shared.hint
    deep = {"tensor_parallel_mode": "3d", "tensor_parallel_mesh": {"inner": 16}}
    shared = refusal(workshop, "gpt2 64 dropout", deep | ONE_ROW)
    assert "depth × row × inner = 16" in shared.reason and "micro_batch_size: 16" in shared.hint
    assert refusal(workshop, "llama 64", WAYS["ring 2"] | {"attn_implementation": "eager"}).hint.startswith("attn_impl")
    assert refusal(workshop, "llama 96", WAYS["ring 2"] | {"ulysses_size": 4}).key == "ulysses_size"
    positions = refusal(workshop, "gpt2 64", WAYS["ring 2"] | {"sequence_len": 64})
    assert (positions.key, positions.hint) == ("sequence_len", "at most 32")


@SLOW
def test_the_config_of_the_page_trains_on_8_ranks_at_small_size(workshop: Workshop, plain, tmp_path):
    """docs/context-parallel.md: 2 (FSDP) × 2 (context) × 2 (tensor parallelism), one long row at a time."""
    page = Path(__file__).parents[2] / "docs" / "context-parallel.md"
    keys = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)[0])
    keys = {key: value for key, value in keys.items() if key not in ("base_model", "datasets", "sequence_len")}
    settings = workshop.settings(
        "llama 64", tmp_path / "run", **THREE_STEPS | {"gradient_accumulation_steps": 2} | keys
    )
    rows = {"micro_batch_size": 2, "gradient_accumulation_steps": 2}
    check(settings, run(settings), plain("llama 64", **THREE_STEPS, **rows))
