"""Settings of a rank's process: on a CPU, memory of one step serves the next."""

import platform
import subprocess
import sys

import pytest

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
