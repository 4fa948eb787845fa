"""Five steps on a GPU, at one rank, against the plain loop of transformers on the CPU. Skipped where there is none."""

import pytest
import torch

from train.runs import metrics, plain_loop, run_command

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
