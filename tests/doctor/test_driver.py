"""What the driver prints is read: GPUs, links, versions, which GPUs are visible; nothing where there is none."""

import itertools
from dataclasses import replace

import pytest

from doctor.drivers import driver
from tessera.core import driver as drivers
from tessera.core.driver import Gpu, cuda_of_driver, gpus, links, nvidia_smi, visible


def test_a_machine_without_a_driver_has_no_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_smi(["topo", "-m"]) is None
    assert gpus() == [] and links() == {} and cuda_of_driver() is None


def test_a_driver_that_hangs_or_fails_has_none_either(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(drivers, "PATIENCE", 0.2)
    for content in ("sleep 60", "echo 0, GPU-0, broken; exit 9"):
        tool.write_text(f"#!/bin/sh\nexec {content}\n" if "sleep" in content else f"#!/bin/sh\n{content}\n")
        tool.chmod(0o755)
        assert nvidia_smi([]) is None and gpus() == []
    monkeypatch.setattr(drivers, "PATIENCE", 60)
    tool.write_text("#!/bin/sh\necho 'CUDA Version: 12.4'\n")
    assert cuda_of_driver() == (12, 4)


def test_every_pair_of_an_nvlink_machine():
    found = links(driver("a100"))
    assert set(found) == set(itertools.combinations(range(8), 2))
    assert {str(link) for link in found.values()} == {"NVLink × 12"}
    assert {(link.kind, link.lanes) for link in found.values()} == {("NVLink", 12)}


def test_a_machine_with_pcie_alone():
    found = links(driver("4090"))
    assert len(found) == 6 and {link.kind for link in found.values()} == {"PCIe"}
    assert (found[0, 1].word, found[1, 2].word) == ("PHB", "SYS")
    assert str(found[1, 2]) == "PCIe through the link between CPU sockets (SYS)"


def test_bridges_join_some_pairs():
    nvlink = {pair for pair, link in links(driver("bridged")).items() if link.kind == "NVLink"}
    assert nvlink == {(0, 2), (1, 3)}


@pytest.mark.parametrize("old", [False, True])
def test_gpus_of_old_and_new_drivers(old):
    found = gpus(driver("a100", old=old))
    assert [gpu.index for gpu in found] == list(range(8))
    hot = found[5]
    assert (hot.memory, hot.used, hot.clock, hot.clock_most) == (81920 * 2**20, 4 * 2**20, 705, 1410)
    assert hot.slowed == ["it is too hot for the hardware"] and not hot.idle
    assert found[0].idle and not found[0].slowed


def test_what_a_driver_does_not_know_is_none():
    found = gpus(driver("4090"))
    assert [gpu.errors for gpu in found] == [None] * 4 and not any(gpu.mig for gpu in found)
    assert [gpu.slowed for gpu in found] == [[]] * 4  # a cap of power is how a GPU runs at full load
    assert (found[2].width, found[2].width_most, found[1].power_limit) == (4, 16, 300.0)
    assert gpus(lambda words: "no devices were found") == []


def test_the_newest_cuda_that_the_driver_serves():
    assert cuda_of_driver(driver("4090")) == (12, 2)


def test_which_gpus_are_visible_and_in_which_order():
    every = [Gpu(number, f"GPU-{number}abc", "A100", "550") for number in range(4)]

    def chosen(text):
        return [gpu.index for gpu in visible(every, text)]

    assert chosen(None) == [0, 1, 2, 3] and chosen("") == []
    assert chosen("2,0") == [2, 0] and chosen("GPU-3a, 1") == [3, 1]
    assert chosen("1,7,2") == [1] and chosen("-1") == []
    assert chosen("MIG-8a1b,1") == [], "no GPU is cut"
    every[1:3] = [replace(gpu, mig=True) for gpu in every[1:3]]
    assert chosen("MIG-8a1b") == [1] and chosen("MIG-GPU-2abc/3/0") == [2] and chosen("MIG-GPU-3abc/3/0") == []
