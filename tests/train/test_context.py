"""Runs whose sequences lie over ranks, against transformers: loss, gradient norm, and the weights handed out."""

from typing import Any

import pytest

from train.runs import THREE_STEPS, Workshop, run
from train.test_parity import check

TP2 = {"tensor_parallel_size": 2}
TWO = {"tensor_parallel_mode": "2d", "tensor_parallel_mesh": {"row": 2, "col": 2}}


def context(size: int, mode: str, **keys: Any) -> dict[str, Any]:
    return {"context_parallel_size": size, "context_parallel_mode": mode, **keys}


LAYOUTS = {
    "ring 2": context(2, "ring"),
    "exchange 4": context(4, "exchange"),
    "ulysses 2": context(2, "ulysses"),
    "ring 2 × ulysses 2": context(4, "ring", ulysses_size=2),
    "exchange 2 × tp 2": context(2, "exchange", **TP2),
    "auto 2 × fsdp 2": context(2, "auto", dp_shard_size=2, micro_batch_size=2),
    "2d 2×2, one row": TWO | {"micro_batch_size": 1, "gradient_accumulation_steps": 4},
    "exchange 2 × 2d 2×2, one row": context(2, "exchange", **TWO, micro_batch_size=1, gradient_accumulation_steps=4),
}
ROWS = {"micro_batch_size": 4, "gradient_accumulation_steps": 1}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_equals_the_plain_loop(workshop: Workshop, plain, tmp_path, layout):
    settings = workshop.settings("llama 64", tmp_path / "run", **(THREE_STEPS | ROWS | LAYOUTS[layout]))
    check(settings, run(settings), plain("llama 64", **THREE_STEPS, **ROWS))
