"""unfrozen_parameters: what is not named gets no gradient, no optimizer state, and nothing of it travels."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from support.pool import pool
from tessera.checkpoint.folder import read_checkpoint
from tessera.config.schema import TrainConfig
from tessera.core.errors import UserError
from tessera.models.hub import read_model_config
from tessera.models.trained import trained_parameters
from tessera.train.run import resolve
from train.on_rank import said_on_rank
from train.runs import Optimizers, Workshop, adamw, exported, metrics, plain_loop, refusal_on_rank, run
from train.test_geometries import calls
from train.test_parity import SAME, SAME_WEIGHTS, worst_difference, worst_weight

BATCH = {"max_steps": 3, "micro_batch_size": 2}
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


def tied(model: Any) -> bool:
    return bool(model.config.tie_word_embeddings)


def frozen(patterns: list[str]) -> Any:
    """The plain loop's optimizers, after freezing all else as torch's users do."""

    def make(model: Any, settings: dict[str, Any]) -> Optimizers:
        for name, parameter in model.named_parameters():
            names = [name, "lm_head.weight"] if name == "model.embed_tokens.weight" and tied(model) else [name]
            parameter.requires_grad_(any(re.match(pattern, one) for pattern in patterns for one in names))
        return adamw(model, settings)

    return make


def runs() -> Iterator[Any]:
    """Every layout and choice; of them run always: each layout with one choice, and one layout with each."""
    for place, layout in enumerate(LAYOUTS):
        for number, chosen in enumerate(PATTERNS):
            always = layout == "2d 2×2" or place % len(PATTERNS) == number
            yield pytest.param("llama 64", layout, PATTERNS[chosen], marks=[] if always else [pytest.mark.slow])
    yield "llama 64 tied", "2d 2×2", ["lm_head.weight"]
    yield "llama 64 tied", "fsdp 2 × tp 2", ["model.layers.0"]
    yield "gpt2 64", "2d 2×2", ["transformer.h.1.attn.c_attn.bias", "transformer.h.0.mlp"]
    yield "gpt2 64", "fsdp 2 × tp 2", ["transformer.wpe", "transformer.h.0.ln_1"]
    yield "qwen3 64", "3d 2×2×1", ["model.layers.[0-9].self_attn.(k_norm|o_proj)"]


@pytest.mark.parametrize(("case", "layout", "patterns"), list(runs()), ids=str)
def test_a_run_equals_the_plain_loop_that_freezes_the_others(workshop: Workshop, tmp_path, case, layout, patterns):
    own = BATCH | LAYOUTS[layout] | {"unfrozen_parameters": patterns}
    settings = workshop.settings(case, tmp_path / "run", **own)
    data_ranks = settings.get("dp_shard_size", 1) * settings.get("dp_replicate_size", 1)
    whole = settings | {"micro_batch_size": settings["micro_batch_size"] * data_ranks}
    found, plain = run(settings), plain_loop(whole, frozen(patterns))
    assert worst_difference(found, plain) <= SAME
    assert worst_weight(settings, plain)[0] <= SAME_WEIGHTS
    before = transformers.AutoModelForCausalLM.from_pretrained(settings["base_model"]).state_dict()
    after = exported(settings)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    trained = {name for name, parameter in plain.model.named_parameters() if parameter.requires_grad}
    assert changed == trained


# ---- What does not travel


def calls_of(workshop: Workshop, folder: Path, **own: Any) -> dict[tuple[str, str], int]:
    run(workshop.settings("llama 64", folder, **BATCH | {"max_steps": 1} | own))
    return calls(folder)


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [({}, "reduce_scatter"), ({"tensor_parallel_slices": 2}, "reduce_scatter"),
     ({"tensor_parallel_schedule": "summa"}, "reduce")],
)  # fmt: skip
def test_no_gradient_of_a_frozen_matrix_travels_along_row(workshop: Workshop, tmp_path, schedule, kind):
    """Along row nothing but weights and their gradients moves."""
    own = LAYOUTS["2d 2×2"] | schedule
    whole = calls_of(workshop, tmp_path / "whole", **own)
    norms = calls_of(workshop, tmp_path / "norms", **own, unfrozen_parameters=["model.layers.0.input_layernorm"])
    one = calls_of(workshop, tmp_path / "one", **own, unfrozen_parameters=["model.layers.1.self_attn.k_proj"])
    moves = 4 if schedule else 2  # two micro-batches, two panels
    assert whole["row", kind] > moves
    assert ("row", kind) not in norms
    assert one["row", kind] == moves


def test_cannon_brings_home_no_gradient_of_a_frozen_matrix(workshop: Workshop, tmp_path):
    own = LAYOUTS["2d 2×2 cannon"]
    whole = calls_of(workshop, tmp_path / "whole", **own)
    norms = calls_of(workshop, tmp_path / "norms", **own, unfrozen_parameters=["model.layers.0.input_layernorm"])
    # a product shifts W in the forward, W in the backward, and twice the sum of its gradient, which ends at home
    assert whole["row", "shift"] == 2 * norms["row", "shift"]


def test_fsdp_reduces_only_the_units_that_are_trained(workshop: Workshop, tmp_path):
    own = LAYOUTS["hsdp 2×2"]
    whole = calls_of(workshop, tmp_path / "whole", **own)
    one = calls_of(workshop, tmp_path / "one", **own, unfrozen_parameters=["model.layers.0.mlp"])
    assert (whole["shard", "reduce_scatter"], one["shard", "reduce_scatter"]) == (3, 1)
    assert (whole["replicate", "all_reduce"], one["replicate", "all_reduce"]) == (3, 1)


def test_gains_that_are_frozen_are_not_summed(workshop: Workshop, tmp_path):
    own = LAYOUTS["1d 2"]
    whole = calls_of(workshop, tmp_path / "whole", **own)
    one = calls_of(workshop, tmp_path / "one", **own, unfrozen_parameters=["model.layers.0.mlp"])
    assert whole["col", "all_reduce"] == one["col", "all_reduce"] + 1


# ---- What is not kept


def test_only_what_is_trained_has_optimizer_state_and_other_patterns_are_told(workshop: Workshop, tmp_path):
    own = BATCH | LAYOUTS["fsdp 2 × tp 2"] | {"unfrozen_parameters": "model.layers.1.self_attn.(k|v)", "save_steps": 2}
    settings = workshop.settings("llama 64", tmp_path / "run", **own, logging_steps=1)
    said = pool(4).run(said_on_rank, settings)[0]
    assert "2,048 of them are trained (unfrozen_parameters)" in said, said
    assert "\nattention: flash attention\n" in said
    whole = metrics(settings)
    _, metadata = read_checkpoint(tmp_path / "run" / "checkpoint-2")
    kept = {name.split("/")[1] for name in metadata.state_dict_metadata if name.startswith("optimizer/")}
    assert kept == {"layers.1.attention.k.weight", "layers.1.attention.v.weight"}
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    resumed = settings | {"resume_from_checkpoint": True}
    assert [m["loss"] for m in run(resumed)] == [m["loss"] for m in whole]
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    said = refusal_on_rank(resumed | {"unfrozen_parameters": None, "dp_shard_size": 1, "tensor_parallel_size": 1})
    assert "is of another unfrozen_parameters" in said


# ---- Which are meant


@pytest.mark.parametrize(
    ("case", "patterns", "parts"),
    [
        ("llama", ["^model.layers.1.mlp.up_proj.weight$"], {"layers.1.mlp.up.weight"}),
        ("llama", ["model.layers.[1-9]+.mlp.(up|gate)_proj"], {"layers.1.mlp.up.weight", "layers.1.mlp.gate.weight"}),
        ("llama", [r"model\.norm\.weight", "lm_head"], {"norm.weight", "head.weight"}),
        ("llama", ["model.+up_proj"], {"layers.0.mlp.up.weight", "layers.1.mlp.up.weight"}),
        ("llama tied", ["lm_head.weight"], {"embedding.weight"}),
        ("gpt2", ["transformer.h.0.attn.c_attn.bias"], {f"layers.0.attention.{x}.bias" for x in "qkv"}),
    ],
)
def test_patterns_choose_by_the_names_of_hugging_face(workshop: Workshop, case, patterns, parts):
    assert trained_parameters(read_model_config(workshop.model(case)), patterns) == parts


@pytest.mark.parametrize(
    ("pattern", "reason", "hint"),
    [
        ("model.layer.0.mlp", "matches no parameter of the model", "model.layers.0.mlp"),
        ("up_proj", "matches no parameter of the model", "up_proj"),  # names begin with it
        ("modelxnorm.weight", "matches no parameter of the model", "model.norm.weight"),
        ("^model.embed_tokens.weight$[:100]", "names a range", "leave the range out"),
        ("model.norm.weight[3]", "names a range", "leave the range out"),
        ("model.(norm", "is no regular expression", ""),
    ],
)
def test_patterns_that_mean_nothing_are_refused_by_name(workshop: Workshop, tmp_path, pattern, reason, hint):
    settings = workshop.settings("llama", tmp_path / "run", unfrozen_parameters=["model.norm", pattern])
    with pytest.raises(UserError) as caught:
        resolve(TrainConfig.model_validate(settings))
    assert (caught.value.key, caught.value.value) == ("unfrozen_parameters", pattern)
    assert reason in caught.value.reason and hint in caught.value.hint
    assert not (tmp_path / "run").exists()
