"""Settings of a rank's process: on a CPU, memory of one step serves the next."""

import platform
import subprocess
import sys

import pytest
import torch

from tessera.core.device import peak_flops

STEPS = """
import resource, sys
import torch
from tessera.core import device as devices

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for megabytes in (48, 64, 40):  # all above the largest block that malloc ever keeps by itself
        torch.zeros(megabytes * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for kind in sys.argv[1:]:
    devices.prepare(torch.device(kind), tf32=False)
print([faults_of_a_step() for _ in range(12)][-1])  # the first ones make room
"""


def faults(*prepared_for: str) -> int:
    run = subprocess.run([sys.executable, "-c", STEPS, *prepared_for], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of other allocators nothing is asked")
def test_a_step_on_a_cpu_touches_no_fresh_pages():
    pages = 152 * 2**20 // 4096
    assert faults("cpu") < 100
    assert faults() > pages // 2, "the setting is needed"
    assert faults("cuda") > pages // 2, "it is the CPU's"


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA T1000", None),
    ],
)
def test_the_peak_of_a_gpu_is_known_by_its_name_and_in_bfloat16_alone(monkeypatch, name, tera):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu = torch.device("cuda", 0)
    assert peak_flops(gpu) == (tera and tera * 1e12)
    assert peak_flops(gpu, torch.float32) is None and peak_flops(torch.device("cpu")) is None
