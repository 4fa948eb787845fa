"""Five steps of `tessera train` against transformers and torch.optim in a plain loop, from the same files."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from models.hub_models import loaded
from support.forked import tessera
from tessera.data.samples import open_samples
from train.runs import THREE_STEPS, Metrics, Plain, Workshop, command, exported, metrics, plain_loop, run, run_command

SAME = 2e-5
SAME_WEIGHTS = 1e-5
LAYOUTS = [(1, True), (1, False), (2, True), (2, False), (4, True), (4, False)]


def name(value: Any) -> str:
    size, sequence_parallel = value
    return f"col{size} {'sp' if sequence_parallel else 'no-sp'}"


def worst_difference(metrics: Metrics, plain: Plain) -> float:
    assert [m["step"] for m in metrics] == list(range(1, len(plain.losses) + 1))
    pairs = [
        *zip((m["loss"] for m in metrics), plain.losses, strict=True),
        *zip((m["grad_norm"] for m in metrics), plain.norms, strict=True),
    ]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def without_key_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Its exact gradient is zero (a softmax over keys does not see it), and AdamW divides noise by noise."""
    whole = {key: tensor for key, tensor in tensors.items() if not key.endswith("k_proj.bias")}
    for key, tensor in tensors.items():
        if key.endswith("c_attn.bias"):
            query, _, value = tensor.chunk(3)
            whole[key] = torch.cat([query, value])
    return whole


def worst_weight(settings: dict[str, Any], plain: Plain) -> tuple[float, str]:
    ours, theirs = without_key_bias(exported(settings)), without_key_bias(plain.model.state_dict())
    shared = {"lm_head.weight"} if plain.model.config.tie_word_embeddings else set()
    assert ours.keys() == theirs.keys() - shared
    return max(((ours[n] - theirs[n]).norm().item() / theirs[n].norm().item(), n) for n in ours)


def check(settings: dict[str, Any], found: Metrics, plain: Plain) -> None:
    assert worst_difference(found, plain) <= SAME
    difference, tensor = worst_weight(settings, plain)
    assert difference <= SAME_WEIGHTS, tensor
    assert [m["learning_rate"] for m in found] == pytest.approx(plain.rates, rel=1e-14)


def logits(model: transformers.PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
@pytest.mark.parametrize("case", ["llama", "llama tied", "gpt2"])
def test_a_run_equals_the_plain_loop(workshop: Workshop, plain, tmp_path, case, layout):
    size, sequence_parallel = layout
    sizes = {"tensor_parallel_size": size, "sequence_parallel": sequence_parallel}
    settings = workshop.settings(case, tmp_path / "run", **sizes)
    check(settings, run(settings), plain(case))


@pytest.mark.parametrize("case", ["qwen2 64", "qwen2 64 tied", "mistral 64"])
def test_a_family_near_llama_equals_the_plain_loop(workshop: Workshop, plain, tmp_path, case):
    settings = workshop.settings(case, tmp_path / "run", tensor_parallel_size=2)
    check(settings, run(settings), plain(case))
    assert "attention_bias" not in (workshop.model(case) / "config.json").read_text(), "the family says it, no key"


def test_the_command_equals_the_plain_loop_and_transformers_loads_its_model(workshop: Workshop, plain, tmp_path):
    settings = workshop.settings("llama", tmp_path / "run", tensor_parallel_size=2)
    done = run_command(settings, "--num-processes", "2")
    assert done.returncode == 0, done.stderr
    check(settings, metrics(settings), plain("llama"))

    ids = torch.randint(0, 509, (2, 12), generator=torch.Generator().manual_seed(1))
    theirs = logits(transformers.AutoModelForCausalLM.from_pretrained(settings["output_dir"]), ids)
    scale = theirs.abs().max()
    assert (loaded(Path(settings["output_dir"])).logits(ids) - theirs).abs().max() <= 1e-5 * scale
    assert (logits(plain("llama").model, ids) - theirs).abs().max() <= 1e-5 * scale
    before = transformers.AutoModelForCausalLM.from_pretrained(settings["base_model"])
    assert (logits(before, ids) - theirs).abs().max() > 1e-3 * scale, "training changed nothing"


def test_one_process_without_torch_distributed_equals_the_plain_loop(workshop: Workshop, plain, tmp_path):
    settings = workshop.settings("gpt2", tmp_path / "run", optimizer="adamw_torch")
    done = tessera(*command(settings)[3:])
    assert done.codes == [0], done.err
    check(settings, metrics(settings), plain("gpt2"))


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_label_smoothing_equals_the_plain_loop(workshop: Workshop, plain, tmp_path, case):
    smoothing = {"label_smoothing_factor": 0.1}
    settings = workshop.settings(case, tmp_path / "run", tensor_parallel_size=2, **smoothing)
    found = run(settings)
    check(settings, found, plain(case, **smoothing))
    assert worst_difference(found, plain(case)) > 100 * SAME


def test_beta_and_epsilon_of_adam_equal_the_plain_loop(workshop: Workshop, tmp_path):
    settings = workshop.settings("llama", tmp_path / "run", **THREE_STEPS, adam_beta1=0.5, adam_epsilon=1e-3)
    check(settings, run(settings), plain_loop(settings))


def test_a_last_step_that_the_rows_do_not_fill_equals_the_plain_loop(workshop: Workshop, plain, tmp_path):
    """26 rows, 6 a step: of the fifth step's two micro-batches one has a row of padding, the other nothing else."""
    epoch = {"max_steps": None}
    settings = workshop.settings("llama", tmp_path / "run", tensor_parallel_size=2, **epoch)
    check(settings, run(settings), plain("llama", **epoch))


def test_gradient_checkpointing_changes_nothing(workshop: Workshop, plain, tmp_path):
    settings = workshop.settings("gpt2", tmp_path / "run", tensor_parallel_size=2, gradient_checkpointing=True)
    check(settings, run(settings), plain("gpt2"))


@pytest.mark.parametrize("size", [1, 2])
def test_bf16_is_close_and_keeps_float32_parameters(workshop: Workshop, plain, tmp_path, size):
    settings = workshop.settings("llama", tmp_path / "run", tensor_parallel_size=size, bf16=True)
    found, want = run(settings), plain("llama")
    assert [m["loss"] for m in found] == pytest.approx(want.losses, rel=0.02)
    assert worst_difference(found, want) > SAME, "this was not bfloat16"
    assert {tensor.dtype for tensor in exported(settings).values()} == {torch.float32}


def test_the_held_out_loss_is_that_of_transformers(workshop: Workshop, tmp_path):
    settings = workshop.settings("llama", tmp_path / "run", tensor_parallel_size=2, max_steps=2, val_set_size=5)
    found = run(settings)
    assert "eval_loss" not in found[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(settings["output_dir"])
    total, count = 0.0, 0
    rows = open_samples(tmp_path / "run" / "prepared", "eval")
    assert len(rows) == 5
    for tokens, labels in (rows[i] for i in range(5)):
        scores = logits(model, torch.tensor(tokens[None].astype("int64")))[0, :-1]
        targets = torch.tensor(labels[1:].astype("int64"))
        total += torch.nn.functional.cross_entropy(scores, targets, reduction="sum").item()
        count += int((targets != -100).sum())
    assert found[1]["eval_loss"] == pytest.approx(total / count, rel=SAME)


# ---- What would be wrong is far outside the tolerance


@pytest.mark.parametrize(
    "change", [{"weight_decay": 0.0}, {"adam_beta2": 0.999}, {"max_grad_norm": 0.0}, {"warmup_steps": 1}], ids=str
)
def test_a_setting_that_is_not_heeded_would_be_seen(workshop: Workshop, plain, tmp_path, change):
    settings = workshop.settings("llama", tmp_path / "run", **change)
    run(settings)
    assert worst_weight(settings, plain("llama"))[0] > 10 * SAME_WEIGHTS
