"""unfrozen_parameters: what is not named gets no gradient, no optimizer state, and nothing of it travels."""

from typing import Any

import pytest
import torch
import transformers

from train.runs import Optimizers, Workshop, adamw, exported, plain_loop, run
from train.test_parity import SAME, SAME_WEIGHTS, worst_difference, worst_weight

BATCH = {"max_steps": 3, "micro_batch_size": 2}
SCHEDULES = {"summa": "2d", "cannon": "2d"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "1d 2": {"tensor_parallel_size": 2},
    "1d 2 checkpointing": {"tensor_parallel_size": 2, "gradient_checkpointing": True},
    "2d 2×2": {"tensor_parallel_size": 4, "tensor_parallel_mode": "2d"},
    "2d 2×2 summa": {"tensor_parallel_size": 4, "tensor_parallel_mode": "2d", "tensor_parallel_schedule": "summa"},
    "2d 2×2 cannon": {"tensor_parallel_size": 4, "tensor_parallel_mode": "2d", "tensor_parallel_schedule": "cannon"},
    "2d 2×2 slices": {"tensor_parallel_size": 4, "tensor_parallel_mode": "2d", "tensor_parallel_slices": 2},
    "2.5d 2×1×2": {"tensor_parallel_mode": "2.5d", "tensor_parallel_mesh": {"depth": 2, "row": 1, "col": 2}},
    "3d 2×2×1": {"tensor_parallel_mode": "3d", "tensor_parallel_mesh": {"inner": 2, "row": 2, "col": 1}},
    "fsdp 2 × tp 2": {"tensor_parallel_size": 2, "dp_shard_size": 2},
    "hsdp 2×2": {"dp_replicate_size": 2, "dp_shard_size": 2},
}
PATTERNS = {
    "one layer and the head": ["^model.layers.1.+", "lm_head.weight$"],
    "half of the attention": ["model.layers.[0-9]+.self_attn.(q|v)_proj"],
    "norms": ["model.layers.0.input_layernorm", "model.norm"],
    "the embedding": ["model.embed_tokens"],
}


def frozen(patterns: list[str]) -> Any:
    """The plain loop's optimizers, after freezing all else as torch's users do."""

    def make(model: Any, settings: dict[str, Any]) -> Optimizers:
        import re

        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(re.match(pattern, name) for pattern in patterns))
        return adamw(model, settings)

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chosen", PATTERNS)
def test_a_run_equals_the_plain_loop_that_freezes_the_others(workshop: Workshop, tmp_path, layout, chosen):
    patterns = PATTERNS[chosen]
    own = BATCH | LAYOUTS[layout] | {"unfrozen_parameters": patterns}
    settings = workshop.settings("llama 64", tmp_path / "run", **own)
    data_ranks = settings.get("dp_shard_size", 1) * settings.get("dp_replicate_size", 1)
    whole = settings | {"micro_batch_size": settings["micro_batch_size"] * data_ranks}
    found, plain = run(settings), plain_loop(whole, frozen(patterns))
    assert worst_difference(found, plain) <= SAME
    assert worst_weight(settings, plain)[0] <= SAME_WEIGHTS
    before = transformers.AutoModelForCausalLM.from_pretrained(settings["base_model"]).state_dict()
    after = exported(settings)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name, parameter in plain.model.named_parameters() if parameter.requires_grad}
