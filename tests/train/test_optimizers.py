"""Every optimizer beside its library's own on the whole model in a plain loop; its state through checkpoints."""

import importlib.util
from typing import Any

import pytest
import torch

from train.runs import Optimizers, Workshop, adamw, plain_loop, run
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("own", "make"), [(SGD, sgd), (MUON, muon)], ids=["sgd", "muon"])
def test_a_run_equals_the_plain_loop_with_torchs_own(workshop: Workshop, tmp_path, own, make, layout):
    settings = workshop.settings("llama 64", tmp_path / "run", **BATCH | own | LAYOUTS[layout])
    data_ranks = settings.get("dp_shard_size", 1)
    whole = settings | {"micro_batch_size": settings["micro_batch_size"] * data_ranks}
    found, plain = run(settings), plain_loop(whole, make)
    # Muon orthogonalises in bfloat16, where a bit of a gradient may decide a rounding
    assert worst_difference(found, plain) <= (SAME if own is SGD else 2e-4)
    assert worst_weight(settings, plain)[0] <= (SAME_WEIGHTS if own is SGD else 1e-3)
    assert worst_weight(settings, plain_loop(whole, adamw))[0] > 1e-2, "this was AdamW"
