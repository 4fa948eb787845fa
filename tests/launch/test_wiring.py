"""The launcher gives its ranks the order of GPUs that their measured links ask for, once and for all of them."""

from dataclasses import replace

import pytest
import torch

from distributed.model_cases import LLAMA
from launch.test_launch import script
from tessera.config.load import make_config
from tessera.core.device import ORDER, local_device, stack
from tessera.core.errors import UserError
from tessera.launch import launch, wiring
from tessera.launch.wiring import wired_order
from tessera.launch.workers import environment, run_workers
from tessera.plan.cluster import profiles_folder
from tessera.plan.machine import shipped_profiles, written_profile

UUIDS = tuple(f"0000000{n}-aaaa-bbbb-cccc-dddddddddddd" for n in range(4))
PAIRS = tuple((a, b, 5e10 if b - a == 2 else 1.2e10) for a in range(4) for b in range(a + 1, 4))
LAYOUT = {"dp_shard_size": 2, "tensor_parallel_size": 2}
NAME = "four GPUs with bridges 0-2 and 1-3"


@pytest.fixture(autouse=True)
def four_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in (ORDER, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))


def keep(**changes):
    """A measured profile of this machine in the cache folder."""
    made = replace(shipped_profiles()["A100-80"], name=NAME, devices_per_machine=4, measured=True)
    made = replace(made, stack=stack(gpu=True), devices=UUIDS, pairs=PAIRS)
    profiles_folder().mkdir(parents=True, exist_ok=True)
    (profiles_folder() / "made.json").write_text(written_profile(replace(made, **changes)))


def driver(words):
    """What nvidia-smi prints of these four GPUs."""
    assert words[0].startswith("--query-gpu=index,uuid")
    fields = len(words[0].split(","))
    return "\n".join(", ".join([str(n), f"GPU-{uuid}", *["x"] * (fields - 2)]) for n, uuid in enumerate(UUIDS))


def order_of(here=4, ask=driver, **keys):
    """Many tokens: col moves more than shard."""
    keys = {"sequence_len": 4096} | keys
    config = make_config({"base_model": "x", "datasets": [{"path": "y"}], "micro_batch_size": 8} | LAYOUT | keys)[0]
    return wired_order(config, LLAMA, here, ask)


def test_neighbours_along_the_innermost_axis_have_a_bridge_and_the_run_says_so():
    keep()
    variables, (said,) = order_of()
    assert variables == {ORDER: "0,2,1,3"}
    assert said == (
        f"GPUs: links between GPUs differ (12 to 50 GB/s, {NAME}); ranks take them in the order 0, 2, 1, 3: "
        "col 2 on 50 GB/s, not 12; shard 2 on 12 GB/s, not 50"
    )


def test_where_weights_move_more_than_tokens_they_keep_the_bridges():
    keep()
    variables, (said,) = order_of(sequence_len=8)
    assert variables == {} and "usual order, none is better" in said


def test_where_the_usual_order_is_the_best_it_is_said_and_kept():
    keep()
    variables, (said,) = order_of(dp_shard_size=1, tensor_parallel_size=4)
    assert variables == {} and "usual order, none is better" in said


def test_on_several_machines_the_axes_of_one_machine_count():
    keep()
    assert order_of(dp_shard_size=4)[0] == {ORDER: "0,2,1,3"}


def test_fewer_ranks_than_gpus_take_the_first_ones():
    keep(pairs=tuple((a, b, 5e10 if b == a + 1 else 1.2e10) for a, b, _ in PAIRS))
    assert order_of(here=2, dp_shard_size=1) == ({}, []), "one pair alone has one kind of link"


OTHERS = {
    "other GPUs of the kind": {"devices": (*UUIDS[:3], "another")},
    "the same in another order": {"devices": UUIDS[::-1]},
    "other software": {"stack": "torch 2.0"},
    "fewer ranks": {"devices": UUIDS[:2]},
    "links that are alike": {"pairs": tuple((a, b, 5e10) for a, b, _ in PAIRS)},
    "pairs that were not measured": {"pairs": PAIRS[1:]},
    "CPUs": {"devices": ()},
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_profile_of_anything_else_is_not_used(other):
    keep(**OTHERS[other])
    assert order_of() == ({}, [])


def test_gpus_that_cuda_counts_otherwise_are_not_those_that_were_measured(monkeypatch):
    keep()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0,2,3")
    assert order_of() == ({}, [])


def test_without_a_profile_the_driver_is_not_asked_and_without_a_driver_nothing_changes():
    asked = []
    assert order_of(ask=asked.append) == ({}, []) and not asked
    keep()
    assert order_of(ask=lambda words: None) == ({}, [])


def test_what_the_user_has_set_stands(monkeypatch):
    keep()
    monkeypatch.setenv(ORDER, "3,2,1,0")
    assert order_of() == ({}, [])


def test_on_cpus_nothing_changes(monkeypatch):
    keep()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert order_of() == ({}, [])


# ---- In the ranks


def taken(monkeypatch, rank, order):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name, value in {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "4", ORDER: order}.items():
        monkeypatch.setenv(name, value)
    assert local_device().index == chosen[0]
    return chosen[0]


def test_a_rank_takes_the_gpu_at_its_place_in_the_order(monkeypatch):
    assert [taken(monkeypatch, rank, "0,2,1,3") for rank in range(4)] == [0, 2, 1, 3]
    assert [taken(monkeypatch, rank, "") for rank in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("order", ["0,2,1", "0,0,1,2", "0,1,2,7", "abc"])
def test_what_is_no_order_is_refused(monkeypatch, order):
    with pytest.raises(UserError, match="each of 0 to 3 once"):
        taken(monkeypatch, 0, order)


def test_every_rank_finds_the_order_in_its_environment(tmp_path, capfd):
    body = f"import os; print('got', os.environ.get({ORDER!r}))"
    with environment({ORDER: "1,0"}):
        run_workers(script(tmp_path, body), 2)
    assert "got 1,0" in capfd.readouterr().out


def test_a_launch_hands_the_order_to_its_ranks_and_tells_it(tmp_path, capfd, monkeypatch):
    import os

    from tessera.train import run

    config = make_config({"base_model": "x", "datasets": [{"path": "y"}], "output_dir": str(tmp_path / "out")} | LAYOUT)
    made, ran = type("Run", (), {"config": config[0], "model": LLAMA})(), []
    monkeypatch.setattr(run, "prepared_run", lambda *_: made)
    monkeypatch.setattr(wiring, "wired_order", lambda *_: ({ORDER: "0,2,1,3"}, ["GPUs: in another order"]))
    monkeypatch.setattr(launch, "run_workers", lambda *_: ran.append(os.environ[ORDER]))
    launch._launch_ranks(config[0], launch.LaunchOptions(), launch.Place(), 4, [])
    assert ran == ["0,2,1,3"] and ORDER not in os.environ
    assert "GPUs: in another order" in capfd.readouterr().out
