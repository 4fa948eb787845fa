"""Every optimizer beside its library's own on the whole model in a plain loop; its state through checkpoints."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.test_resume import copy_of, losses
from support.forked import tessera
from tessera.config.schema import TrainConfig
from tessera.core.errors import UserError
from tessera.train.run import resolve
from train.runs import Optimizers, Workshop, adamw, command, exported, metrics, plain_loop, refusal_on_rank, run
from train.test_parity import SAME, SAME_WEIGHTS, worst_difference, worst_weight

SGD = {"optimizer": "sgd", "optim_args": {"momentum": 0.9, "nesterov": True}, "learning_rate": 1e-2}
MUON = {"optimizer": "muon", "optim_args": "adjust_lr_fn=match_rms_adamw"}
LOW_BITS = ["adamw_torch_8bit", "adamw_torch_4bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
BATCH = {"max_steps": 4, "micro_batch_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "1d 2": {"tensor_parallel_size": 2},
    "2d 2×2": {"tensor_parallel_size": 4, "tensor_parallel_mode": "2d"},
    "2.5d 2×1×2": {
        "tensor_parallel_mode": "2.5d", "tensor_parallel_mesh": {"depth": 2, "row": 1, "col": 2}
    },
    "3d 2×1×2": {
        "tensor_parallel_mode": "3d", "tensor_parallel_mesh": {"inner": 2, "row": 1, "col": 2}
    },
    "fsdp 2 × tp 2": {"tensor_parallel_size": 2, "dp_shard_size": 2},
}  # fmt: skip


def needs(name: str) -> Any:
    package = "torchao" if "torch" in name else "bitsandbytes"
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def sgd(model: Any, settings: dict[str, Any]) -> Optimizers:
    own = {"lr": 0.0, "weight_decay": settings["weight_decay"]}
    return [torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **own)]


def muon(model: Any, settings: dict[str, Any]) -> Optimizers:
    matrices = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    others = [p for name, p in model.named_parameters() if not (".layers." in name and p.ndim == 2)]
    decay = settings["weight_decay"]
    ours = torch.optim.Muon(matrices, lr=0.0, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [ours, torch.optim.AdamW(others, lr=0.0, betas=(0.9, settings["adam_beta2"]), weight_decay=decay)]


OWN: dict[str, Any] = {"sgd": (SGD, sgd), "muon": (MUON, muon)}


# Of sgd, which treats every element alike, two layouts run always.
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(
            name, layout, marks=[] if name == "muon" or layout in ("1d 2", "fsdp 2 × tp 2") else pytest.mark.slow
        )
        for name in OWN
        for layout in LAYOUTS
    ],
)
def test_a_run_equals_the_plain_loop_with_torchs_own(workshop: Workshop, tmp_path, name, layout):
    own, make = OWN[name]
    settings = workshop.settings("llama 64", tmp_path / "run", **BATCH | own | LAYOUTS[layout])
    data_ranks = settings.get("dp_shard_size", 1)
    whole = settings | {"micro_batch_size": settings["micro_batch_size"] * data_ranks}
    found, plain = run(settings), plain_loop(whole, make)
    # Muon orthogonalises in bfloat16, where a bit of a gradient may decide a rounding
    assert worst_difference(found, plain) <= (SAME if own is SGD else 2e-4)
    assert worst_weight(settings, plain)[0] <= (SAME_WEIGHTS if own is SGD else 1e-3)
    assert worst_weight(settings, plain_loop(whole, adamw))[0] > 1e-2, "this was AdamW"


def low_bits(name: str) -> Any:
    """The optimizer of the library itself, on the whole model."""

    def make(model: Any, settings: dict[str, Any]) -> Optimizers:
        own = {"betas": (0.9, settings["adam_beta2"]), "eps": 1e-8, "weight_decay": settings["weight_decay"]}
        parameters = list(model.parameters())
        if name.startswith("adamw_torch"):
            import torchao.optim as ao

            torch.compiler.set_stance("force_eager")
            return [(ao.AdamW8bit if "8" in name else ao.AdamW4bit)(parameters, lr=0.0, **own)]
        import bitsandbytes.optim as bnb

        return [bnb.AdamW(parameters, lr=0.0, optim_bits=32 if "32" in name else 8, **own)]

    return make


LOW = {"max_steps": 6, "micro_batch_size": 2, "save_steps": 3}
always = {"adamw_torch_8bit", "paged_adamw_8bit"}  # importing a library takes seconds in each process


@pytest.fixture(scope="session")
def low_bit_run(workshop: Workshop, tmp_path_factory):
    """The settings of a run with an optimizer and size, and what it has found; made when first asked for."""
    made: dict[Any, Any] = {}

    def of(name: str, size: int) -> Any:
        if (name, size) not in made:
            own = LOW | {"optimizer": name, "tensor_parallel_size": size}
            settings = workshop.settings("llama 64", tmp_path_factory.mktemp("low") / "run", **own)
            made[name, size] = settings, run(settings), exported(settings)
        return made[name, size]

    return of


NAMES = [pytest.param(name, marks=[needs(name), *([] if name in always else [pytest.mark.slow])]) for name in LOW_BITS]


@pytest.mark.parametrize("name", NAMES)
def test_one_process_equals_the_plain_loop_with_the_librarys_own(low_bit_run, name):
    settings, found, _ = low_bit_run(name, 1)
    plain = plain_loop(settings, low_bits(name))
    difference, _ = worst_weight(settings, plain)
    assert worst_difference(found, plain) <= SAME
    assert difference <= SAME_WEIGHTS
    if "32" not in name:
        assert worst_weight(settings, plain_loop(settings, adamw))[0] > 10 * SAME_WEIGHTS, "this was AdamW in 32 bits"


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_begin_alike_and_end_close(low_bit_run, name):
    """Blocks of moments lie otherwise in shards: the first loss is the same, later ones nearly so."""
    (_, alone, _), (_, found, _) = low_bit_run(name, 1), low_bit_run(name, 2)
    assert found[0]["loss"] == pytest.approx(alone[0]["loss"], rel=SAME)
    assert [m["loss"] for m in found] == pytest.approx([m["loss"] for m in alone], rel=0.03 if "4bit" in name else 5e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_goes_on_bit_for_bit(low_bit_run, tmp_path, name):
    settings, whole, model = low_bit_run(name, 2)
    resumed = copy_of(settings, tmp_path / "run")
    found = run(resumed)
    assert losses(found) == losses(whole)
    assert all(torch.equal(tensor, model[key]) for key, tensor in exported(resumed).items())


@pytest.mark.parametrize(
    ("name", "then"),
    [
        pytest.param("adamw_torch_8bit", {"tensor_parallel_size": 1}, marks=needs("adamw_torch_8bit")),
        pytest.param("adamw_torch_8bit", {"optimizer": "adamw_torch"}, marks=needs("adamw_torch_8bit")),
    ],
    ids=str,
)
def test_a_checkpoint_goes_on_in_another_layout_and_with_another_adamw(low_bit_run, tmp_path, name, then):
    settings, whole, _ = low_bit_run(name, 2)
    found = run(copy_of(settings, tmp_path / "run", **then))
    assert found[3]["loss"] == pytest.approx(whole[3]["loss"], rel=SAME)
    assert [m["loss"] for m in found] == pytest.approx([m["loss"] for m in whole], rel=5e-3)


@pytest.mark.parametrize("own", [pytest.param(SGD, marks=pytest.mark.slow), MUON], ids=["sgd", "muon"])
def test_a_run_with_another_optimizer_resumes_bit_for_bit_and_in_another_layout(workshop: Workshop, tmp_path, own):
    settings = workshop.settings("llama 64", tmp_path / "whole", **LOW | own | LAYOUTS["fsdp 2 × tp 2"])
    whole = run(settings)
    resumed = copy_of(settings, tmp_path / "run")
    assert losses(run(resumed)) == losses(whole)
    other = copy_of(settings, tmp_path / "other", dp_shard_size=1, micro_batch_size=4)
    assert [m["loss"] for m in run(other)] == pytest.approx([m["loss"] for m in whole], rel=2e-4)
    refused = copy_of(settings, tmp_path / "refused", optimizer="adamw_torch", optim_args=None)
    said = refusal_on_rank(refused | {"tensor_parallel_size": 1, "dp_shard_size": 1})
    assert "is of another optimizer" in said and "momentum_buffer" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in LOW_BITS])
@pytest.mark.parametrize(
    ("model", "own"),
    [("qwen3 64", {"dp_shard_size": 6, "micro_batch_size": 1}), ("llama 64", {"bf16": "full"})],
    ids=["shards of no element", "bf16"],
)
def test_odd_shards_and_dtypes_resume_bit_for_bit_too(workshop: Workshop, tmp_path, name, model, own):
    settings = workshop.settings(model, tmp_path / "whole", **LOW | own, optimizer=name)
    whole = run(settings)
    assert losses(run(copy_of(settings, tmp_path / "run"))) == losses(whole)


# ---- Refused before anything starts


def refused(workshop: Workshop, folder: Path, **own: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        resolve(TrainConfig.model_validate(workshop.settings("llama", folder, **own)))
    assert not folder.exists()
    return caught.value


@pytest.mark.parametrize(("name", "package"), [("adamw_torch_4bit", "torchao"), ("adamw_bnb_8bit", "bitsandbytes")])
def test_a_package_that_is_not_there_is_named(workshop: Workshop, tmp_path, monkeypatch, name, package):
    monkeypatch.setattr("tessera.engine.optimizer.importlib.util.find_spec", lambda name: None)
    error = refused(workshop, tmp_path / "run", optimizer=name)
    assert error.reason == f"needs the package {package}, which is not installed"
    assert error.hint.startswith(f"pip install {package}")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("sgd", {"foo": 1}, "sgd has no option foo"),
        ("sgd", {"momentum": "a"}, "momentum: a is not of type float"),
        ("sgd", {"nesterov": True}, "Nesterov momentum requires"),
        ("muon", {"adjust_lr_fn": "other"}, "other is not supported"),
        ("muon", {"ns_coefficients": [1, 2]}, "exactly 3 values"),
        ("adamw_torch_8bit", {"block_size": 0}, "block_size: 0 is no even number"),
        ("adamw_torch", {"momentum": 0.9}, "adamw_torch has no option momentum"),
    ],
)
def test_options_that_an_optimizer_does_not_take_are_named(workshop: Workshop, tmp_path, name, options, said):
    error = refused(workshop, tmp_path / "run", optimizer=name, optim_args=options)
    assert error.key == "optim_args" and said in error.reason


def test_a_schedule_that_lacks_its_options_is_refused(workshop: Workshop, tmp_path):
    error = refused(workshop, tmp_path / "run", lr_scheduler="warmup_stable_decay")
    assert error.key == "lr_scheduler_kwargs" and "num_decay_steps" in error.hint


def test_a_schedule_of_transformers_drives_a_run(workshop: Workshop, tmp_path):
    own = {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 5e-4}, "max_steps": 4}
    settings = workshop.settings("llama", tmp_path / "run", **own)
    assert tessera(*command(settings)[3:]).codes == [0]
    rates = [m["learning_rate"] for m in metrics(settings)]
    assert rates[:3] == pytest.approx([0, 5e-4, 1e-3]) and 5e-4 < rates[3] < 1e-3
    assert refused(workshop, tmp_path / "b", lr_scheduler="polynomial", lr_scheduler_kwargs={"a": 1}).hint == (
        "options of polynomial: lr_end, power"
    )
