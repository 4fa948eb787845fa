"""The trainer on a GPU, at one rank: against the plain loop of transformers on the CPU, stopped and gone on with.

Skipped where there is none.
"""

import shutil
import subprocess
import sys

import pytest
import torch

from train.runs import environment, metrics, plain_loop, run_command

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def differences(settings, plain) -> list[float]:
    done = run_command(settings, gpus="0")
    assert done.returncode == 0, done.stderr
    assert torch.cuda.get_device_name(0) in done.stdout
    found = metrics(settings)
    pairs = [(m["loss"], loss) for m, loss in zip(found, plain.losses, strict=True)]
    pairs += [(m["grad_norm"], norm) for m, norm in zip(found, plain.norms, strict=True)]
    return [abs(a - b) / abs(b) for a, b in pairs]


@pytest.mark.parametrize("case", ["llama", "llama tied", "gpt2"])
def test_float32_equals_the_plain_loop(workshop, tmp_path, case):
    settings = workshop.settings(case, tmp_path / "run")
    assert max(differences(settings, plain_loop(settings))) <= 2e-5


def test_bf16_is_close_to_the_plain_loop(workshop, tmp_path):
    settings = workshop.settings("llama", tmp_path / "run", bf16=True)
    assert 1e-7 < max(differences(settings, plain_loop(settings))) <= 0.02


@pytest.mark.parametrize("gpus", ["0", ""], ids=["gpu", "cpu"])
def test_a_checkpoint_of_a_gpu_goes_on(workshop, tmp_path, gpus):
    """With dropout: its masks, made on the device, are the same on both."""
    whole = workshop.settings("gpt2 dropout", tmp_path / "whole", max_steps=6, save_steps=3)
    assert run_command(whole, gpus="0").returncode == 0
    resumed = whole | {"output_dir": str(tmp_path / "run"), "resume_from_checkpoint": True}
    shutil.copytree(whole["output_dir"], resumed["output_dir"])
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    done = run_command(resumed, gpus=gpus)
    assert done.returncode == 0, done.stderr
    assert (torch.cuda.get_device_name(0) in done.stdout) == bool(gpus)
    for found, expected in zip(metrics(resumed), metrics(whole), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=2e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-5)


def test_nccl_takes_every_collective():
    """In a group of one rank, which is what one GPU allows: shapes, dtypes and options, not sums."""
    done = subprocess.run(
        [sys.executable, "-m", "gpu.nccl_alone"],
        env=environment("0") | {"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
