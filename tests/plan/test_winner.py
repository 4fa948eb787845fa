"""The config that a plan writes trains, and its layout computes what one process computes."""

from dataclasses import replace
from math import isfinite

import numpy as np
import pytest
import yaml

from support.forked import tessera
from tessera.models.shapes import shape_of
from tessera.plan.choice import Training
from tessera.plan.cluster import cluster_of
from tessera.plan.peak import RESERVED
from tessera.plan.recommend import plan
from tessera.plan.search import search
from train.runs import SETTINGS, run, save_model, save_rows

# model, devices, rows of a step; the devices' memory as a share of what the fastest layout would need
CASES = {
    "4": ("llama 64", "4xA100-80", 8, None),
    "4 gpt2 one row": ("gpt2 64", "4xA100-80", 1, None),
    "4 tight": ("llama 64", "4xA100-80", 8, 0.9),
    "2 machines": ("qwen2 64", "2x2xH100", 4, None),
    "4 tied tight": ("qwen2 64 tied", "4xH100", 8, 0.7),
    "8": ("llama 64", "8xA100-80", 8, None),
    "8 gpt2 two rows": ("gpt2 64", "8xA100-80", 2, None),
    "8 tight": ("gpt2 64", "8xA100-80", 8, 0.8),
    "8 mistral": ("mistral 64", "8xH100", 16, 0.9),
    "4 states on the host": ("llama 64", "4xA100-80", 8, 0.6),
    "8 on 2 machines, one row": ("llama 64", "2x4xH100", 1, 0.9),
}


def tight(cluster, model, training, share):
    """The cluster with devices that have that share of the memory which the fastest layout would need to fit surely."""
    found = search(model, cluster, training)
    fastest = int(found.peak[np.argmin(found.seconds)])
    memory = int(fastest * share * 1.03 / 0.85) + RESERVED
    return replace(cluster, profile=replace(cluster.profile, memory_bytes=memory))


def planned(case, folder):
    name, devices, rows, share = CASES[case]
    model, training = str(save_model(name, folder / "model")), Training(16, rows, "float32")
    cluster = cluster_of(devices)
    if share is not None:
        cluster = tight(cluster, shape_of(model), training, share)
    given = SETTINGS | {"max_steps": 2, "warmup_steps": 1, "output_dir": str(folder / "run")}
    given |= {"datasets": [{"path": str(save_rows(folder / "rows.jsonl"))}]}
    return plan(model, cluster, training, config=given)


@pytest.mark.parametrize(
    "case", [case if case in ("4 gpt2 one row", "8") else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
@pytest.mark.usefixtures("small_buffers")
def test_the_winner_trains_and_is_verified(case, tmp_path):
    made = planned(case, tmp_path)
    keys = yaml.safe_load(made.to_yaml())
    lines = run(keys)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and all(map(isfinite, losses))
    if case == "4 states on the host":
        assert keys["fsdp_config"]["offload_params"] and keys["fsdp_config"]["sync_each_batch"]
    (tmp_path / "run.yaml").write_text(made.to_yaml())
    ended = tessera("verify", str(tmp_path / "run.yaml"), ranks=made.cluster.devices)
    assert not any(ended.codes), (made.best.name, ended.err[0], ended.out[0][-1500:])
