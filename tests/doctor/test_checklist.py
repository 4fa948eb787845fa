"""The tuning checklist: what is on, off or not possible, and what turning it on would change, in figures."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from distributed.model_cases import LLAMA
from doctor.test_links import placed
from tessera.core.text import human
from tessera.doctor import checklist as lists
from tessera.doctor.checklist import checklist
from tessera.doctor.finding import Finding
from tessera.doctor.layout import Placed
from tessera.train.less_memory import held_bytes

NAMES = "flash kernel, bf16, TF32, fused optimizer, recompute, fused loss, compile, forward_prefetch, data workers"


def listed(run: Placed) -> dict[str, Finding]:
    found = {finding.subject: finding for finding in checklist(run)}
    for finding in found.values():
        assert finding.state in ("on", "off", "not possible") and finding.text
        assert finding.state != "off" or finding.mend or "hardly anything" in finding.text
    return found


def states(**keys: Any) -> dict[str, str]:
    return {name: finding.state for name, finding in listed(placed(2, **keys)).items()}


def test_every_line_of_the_list():
    found = states(tensor_parallel_size=2)
    assert ", ".join(found) == NAMES
    assert found == {
        "flash kernel": "on",
        "bf16": "off",
        "TF32": "not possible",
        "fused optimizer": "on",
        "recompute": "off",
        "fused loss": "on",
        "compile": "not possible",
        "forward_prefetch": "not possible",
        "data workers": "on",
    }


@pytest.mark.parametrize(
    "keys, name, state",
    [
        ({"attn_implementation": "eager"}, "flash kernel", "off"),
        ({"optimizer": "adamw_torch"}, "fused optimizer", "off"),
        ({"optimizer": "sgd"}, "fused optimizer", "not possible"),
        ({"gradient_checkpointing": True}, "recompute", "on"),
        ({"gradient_checkpointing": "selective"}, "recompute", "on"),
        ({"dp_shard_size": 2}, "forward_prefetch", "off"),
        ({"dp_shard_size": 2, "fsdp_config": {"forward_prefetch": True}}, "forward_prefetch", "on"),
        ({"streaming": True, "max_steps": 1}, "data workers", "on"),
        ({"streaming": True, "max_steps": 1, "dataloader_num_workers": 0}, "data workers", "off"),
    ],
)
def test_a_key_changes_its_line_and_no_other(keys, name, state):
    before, after = states(), states(**keys)
    assert after[name] == state
    changed = {line for line in after if after[line] != before[line]}
    assert changed <= {name} | ({"forward_prefetch"} if "dp_shard_size" in keys else set())


def test_a_model_that_drops_probabilities_has_no_flash_kernel():
    run = placed(1)
    run = replace(run, model=replace(LLAMA, attention_dropout=0.1))
    assert listed(run)["flash kernel"].state == "off"


def test_computing_in_bfloat16_is_seen():
    run = placed(1)
    run = replace(run, parallel=replace(run.parallel, compute=torch.bfloat16))
    assert listed(run)["bf16"].state == "on"


def test_figures_are_those_of_the_formulas():
    run = placed(1, sequence_len=64)
    now, then = (
        held_bytes(run.config.model_copy(update={"gradient_checkpointing": again}), LLAMA, torch.float32, True)
        for again in (False, True)
    )
    assert now > then
    assert listed(run)["recompute"].mend.startswith(f"gradient_checkpointing: true: {human(now - then)} less")
    again = placed(1, sequence_len=64, gradient_checkpointing=True)
    assert f"without it {human(now - then)} more" in listed(again)["recompute"].text


@pytest.mark.parametrize(
    "compute, tf32, bf16_state, tf32_state",
    [
        (torch.float32, False, "off", "off"),
        (torch.float32, True, "off", "on"),
        (torch.bfloat16, False, "on", "off"),
    ],
)
def test_a_gpu_that_could(monkeypatch, compute, tf32, bf16_state, tf32_state):
    run = placed(1, tf32=tf32)
    run = replace(run, parallel=replace(run.parallel, compute=compute))
    monkeypatch.setattr(lists, "has_tf32", lambda device: True)
    assert lists._tf32(run).state == tf32_state
    run.mesh.device = torch.device("cuda")
    monkeypatch.setattr(lists, "has_bf16", lambda device: True)
    assert lists._bf16(run).state == bf16_state
    monkeypatch.setattr(lists, "has_bf16", lambda device: False)
    assert lists._bf16(run).state == ("on" if bf16_state == "on" else "not possible")
