"""Each thing that may be wrong with a machine is said in one line with its mend; what is right says so."""

import errno
import os
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from doctor.drivers import driver
from support.disk import few_files, leave_free, mounted, small_disk  # noqa: F401
from tessera.core.driver import Gpu, gpus
from tessera.core.files import in_words
from tessera.doctor import clocks, devices, limits, memory, network, storage, variables, versions
from tessera.doctor.devices import Torch
from tessera.doctor.finding import Finding
from tessera.doctor.limits import Needs
from tessera.doctor.network import Network
from tessera.doctor.storage import Disk, Place

GIB, DAY = 2**30, 86400


def states(found: list[Finding]) -> dict[str, str]:
    return {finding.subject: finding.state for finding in found}


def only(found: list[Finding], state: str) -> Finding:
    """The one finding of this state; every line that is not fine says what to change."""
    (one,) = [finding for finding in found if finding.state == state]
    assert one.mend and "\n" not in str(one)
    return one


# ---- clocks


def test_a_clock_that_cannot_be_right():
    written = [time.mktime((2026, 3, 1, 0, 0, 0, 0, 0, 0)), 0.0]
    newest = max(written)
    past = clocks.wall_clock(0.0, written)
    assert past.state == "wrong" and "1970-01-01" in past.text and "timedatectl" in past.mend
    assert clocks.wall_clock(newest - DAY, written).state == "wrong"
    assert clocks.wall_clock(newest + 40 * 365 * DAY, written).state == "wrong"
    assert clocks.wall_clock(newest + 5 * 365 * DAY, written).state == "ok"
    assert clocks.wall_clock(newest - 10, written).state == "ok"  # a server of files may be a little ahead
    assert clocks.wall_clock(time.time(), clocks.times_of_packages()).state == "ok"


def test_timers_and_governors():
    def kernel(**texts):
        return lambda path: texts.get(path.rpartition("/")[2])

    assert clocks.timer(kernel(current_clocksource="tsc\n")).state == "ok"
    assert clocks.timer(kernel(current_clocksource="hpet\n")).state == "slow"
    assert clocks.timer(kernel()).state == "unknown"
    asked = {"scaling_governor": "powersave\n", "scaling_driver": "acpi-cpufreq\n"}
    assert clocks.governor(kernel(**asked)).mend == "cpupower frequency-set -g performance"
    assert clocks.governor(kernel(**asked | {"scaling_driver": "intel_pstate\n"})).state == "ok"
    assert clocks.governor(kernel()).state == "unknown"


def test_stolen_time_and_load():
    before = clocks.ticks(lambda path: "cpu  100 0 50 800 10 0 0 40 0 0\ncpu0 1 2\n")
    after = clocks.ticks(lambda path: "cpu  180 0 60 800 10 0 0 60 30 0\ncpu0 1 2\n")
    assert (before.all, before.stolen, after.all, after.stolen) == (1000, 40, 1110, 60)
    found = clocks.stolen(before, after)
    assert found.state == "slow" and found.text.startswith("18.2%")
    assert clocks.stolen(before, replace(after, stolen=42)).state == "ok"
    assert clocks.stolen(before, before).state == clocks.stolen(None, None).state == "unknown"
    busy = clocks.load(9.0, 2, "some avg10=95.06 avg60=94.99 avg300=79.65 total=511918380\n")
    assert busy.state == "slow" and "95% of the last 10 s" in busy.text
    assert clocks.load(2.4, 2, None).state == "ok"


# ---- limits

ROOM = {"open files": (4096, 4096), "processes": (9999, 9999), "file size": (-1, -1), "core file": (0, -1)}
ROOM |= {"locked memory": (2**16, 2**16)}


def test_limits_that_are_too_low():
    assert set(states(limits.limit_findings(ROOM, Needs(8))).values()) == {"ok"}
    few = only(limits.limit_findings(ROOM | {"open files": (64, 2**20)}, Needs(2)), "wrong")
    assert (few.subject, few.mend) == ("open files", "ulimit -n 160 before the run")
    bound = only(limits.limit_findings(ROOM | {"open files": (64, 128)}, Needs(2)), "wrong")
    assert "only root may raise it above 128" in bound.mend
    assert only(limits.limit_findings(ROOM | {"processes": (100, -1)}, Needs(8)), "wrong").subject == "processes"
    assert set(states(limits.limit_findings(ROOM | {"processes": (100, -1)}, Needs(8, root=True))).values()) == {"ok"}


def test_limits_that_matter_for_some_runs_alone():
    rdma = only(limits.limit_findings(ROOM, Needs(8, rdma=True)), "wrong")
    assert rdma.subject == "locked memory" and "--ulimit memlock=-1" in rdma.mend
    small = ROOM | {"file size": (GIB, -1)}
    unknown = only(limits.limit_findings(small, Needs(2)), "wrong")
    assert (unknown.subject, unknown.mend) == ("file size", "ulimit -f unlimited before the run")
    assert only(limits.limit_findings(small, Needs(2, largest_file=2 * GIB)), "wrong").subject == "file size"
    assert states(limits.limit_findings(small, Needs(2, largest_file=GIB)))["file size"] == "ok"


def test_the_limits_of_this_process_are_read():
    here = limits.own_limits()
    assert set(here) == set(ROOM) and here["open files"][0] > 0


# ---- file systems

MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
31 27 0:40 / /data rw shared:3 - nfs4 server:/data rw,vers=4.2
32 27 0:41 / /my\\040disk rw - fuse.s3fs s3fs rw
33 31 0:42 / /data/fast rw - xfs /dev/nvme0n1 rw
"""


def test_the_file_system_of_a_folder():
    def kind(path):
        return storage.mount_of(Path(path), MOUNTS)

    assert kind("/home/x") == ("ext4", "/") and kind("/database") == ("ext4", "/")
    assert kind("/data/run") == ("nfs4", "/data") and kind("/data/fast/run") == ("xfs", "/data/fast")
    assert kind("/my disk/run") == ("fuse.s3fs", "/my disk")
    assert kind("/home/x")[0] != "unknown" == storage.mount_of(Path("/home"), "")[0]


def test_disks_are_judged():
    fine = Disk("ext4", "/", free=100 * GIB, size=200 * GIB, files=10**6, rate=300e6)
    place = Place("output_dir", Path("/x"), needed=GIB)

    def state(where=place, **changes):
        found = storage.disk_finding(where, replace(fine, **changes))
        assert found.state == "ok" or found.mend
        return found.state

    assert state() == "ok" and state(kind="nfs4") == "ok"
    assert state(free=GIB - 1) == "wrong" and state(files=3) == "wrong" and state(files=None) == "ok"
    assert state(refused="permission denied") == "wrong" and state(rate=1e6) == "slow"
    assert state(refused=in_words(OSError(errno.ENOSPC, ""))) == "wrong"
    assert state(kind="fuse.gcsfuse") == "slow"
    scratch = Place("temporary files", Path("/tmp"), needed=GIB)
    assert state(scratch, kind="nfs") == "slow" and state(scratch, kind="tmpfs") == "ok"
    cache = Place("Hugging Face cache", Path("/y"), written=False)
    assert state(cache, free=0) == "ok"  # whoever downloads nothing needs no room there


def test_a_full_disk_says_so(small_disk):  # noqa: F811
    place = Place("output_dir", small_disk / "not" / "yet", needed=10 * 2**20)
    (found,) = storage.storage_findings([place])
    assert found.state == "ok" and "tmpfs, in memory" in found.text
    leave_free(small_disk, 2**20)
    (found,) = storage.storage_findings([place])
    assert found.state == "wrong" and "10 MiB are needed" in found.text and f"make room on {small_disk}" in found.mend
    assert os.listdir(small_disk) == ["ballast"], "what was written to try it is gone"


def test_a_disk_without_files_and_one_that_is_read_only(few_files, tmp_path):  # noqa: F811
    (found,) = storage.storage_findings([Place("output_dir", few_files, needed=0)])
    assert found.state == "wrong" and "more files" in found.text
    with mounted(tmp_path / "read-only", "ro") as folder:
        (found,) = storage.storage_findings([Place("output_dir", folder, needed=0)])
    assert found.state == "wrong" and "read-only" in found.text


def test_a_file_system_that_does_not_answer_or_lets_nobody_in():
    place, gone = Place("output_dir", Path("/x")), threading.Event()
    (found,) = storage.storage_findings([place], lambda path, write: gone.wait(60), patience=0.05)
    gone.set()
    assert found.state == "wrong" and "did not answer" in found.text and "umount" in found.mend

    def refused(path, write):
        raise PermissionError(errno.EACCES, "")

    (found,) = storage.storage_findings([place], refused)
    assert found.state == "wrong" and "permission denied" in found.text and found.mend


def test_how_fast_a_disk_takes_a_file(tmp_path):
    ticking = iter(range(0, 1000, 1))
    disk = storage.disk_of(tmp_path, clock=lambda: float(next(ticking)))
    assert 0 < disk.rate <= 2**20 * storage.PROBE_SECONDS  # a block each second: it stops when its time is over
    assert os.listdir(tmp_path) == []
    assert storage.disk_of(tmp_path, write=False).rate is None


# ---- memory

MEMINFO = "MemTotal:       67108864 kB\nMemAvailable:   1 kB\nSwapTotal:       8388608 kB\nSwapFree:        {} kB\n"


def host(need=None, gpus=False, left=60 * GIB, limit=None, swapped=0, shared=(32 * GIB, 32 * GIB)):
    return memory.host_findings(
        need, gpus, lambda path: MEMINFO.format(8388608 - swapped // 1024), lambda: left, lambda: limit, lambda: shared
    )


def test_the_memory_of_the_host():
    assert states(host()) == {"host": "ok", "/dev/shm": "ok"}
    assert "gets 16 GiB" in host(limit=16 * GIB)[0].text and "gets" not in host(limit=2**62)[0].text
    need = memory.Need(20 * GIB, 4, on_gpu=False, less="gradient_checkpointing: true 9 GiB less")
    found = only(host(need), "wrong")
    assert "80 GiB (4 × 20 GiB)" in found.text and found.mend.startswith("gradient_checkpointing")
    assert states(host(replace(need, ranks=2)))["host"] == "ok"
    assert states(host(replace(need, on_gpu=True)))["host"] == "ok"
    assert only(host(swapped=3 * GIB), "slow").subject == "swap"
    assert states(host(left=None))["host"] == "unknown"


def test_little_shared_memory_matters_to_gpus():
    small = (64 * 2**20, 64 * 2**20)
    assert states(host(shared=small))["/dev/shm"] == "ok"
    assert "--shm-size" in only(host(gpus=True, shared=small), "wrong").mend
    assert states(host(shared=None))["/dev/shm"] == "unknown"


def test_shared_memory_that_is_full_is_seen():
    full = (2**20, 32 * GIB)
    found = only(host(gpus=True, shared=full), "wrong")
    assert found.text.startswith("1 MiB of 32 GiB free") and "ls -l /dev/shm" in found.mend
    assert only(host(shared=full), "slow").subject == "/dev/shm"


def test_a_file_system_s_room_is_what_the_kernel_says():
    left, whole = memory.room_of("/")
    assert 0 <= left <= whole and memory.room_of("/nowhere") is None


def test_the_memory_of_gpus():
    found = memory.gpu_findings(gpus(driver("4090")), None)
    assert [finding.state for finding in found] == ["slow", "ok", "ok", "ok"]
    assert "another process holds the rest" in found[0].text and "CUDA_VISIBLE_DEVICES" in found[0].mend
    need = memory.Need(20 * GIB, 4, on_gpu=True, less="bf16: true")
    assert [finding.state for finding in memory.gpu_findings(gpus(driver("4090")), need)][:2] == ["wrong", "ok"]
    assert (
        only(memory.gpu_findings(gpus(driver("4090"))[1:2], replace(need, rank=24 * GIB)), "wrong").mend == "bf16: true"
    )
    assert memory.gpu_findings([Gpu(0, "", "", "")], None)[0].state == "unknown"


# ---- network

FINE = Network("", 29500, "", "node1", ("10.0.0.1",), "", "10.0.0.1", "", {"eth0": 25_000}, ("lo", "eth0"))


def test_a_network_that_is_fine_and_this_one():
    assert set(states(network.network_findings(FINE, 2, {})).values()) == {"ok"}
    assert network.seen(0).loopback == ""


@pytest.mark.parametrize(
    "changes, machines, subject, state",
    [
        ({"loopback": "network is unreachable"}, 1, "loopback", "wrong"),
        ({"unknown_name": "not known"}, 1, "host name", "ok"),
        ({"unknown_name": "not known"}, 2, "host name", "wrong"),
        ({"addresses": ("127.0.1.1",)}, 2, "host name", "ok"),
        ({"port_taken": "address in use"}, 1, "port 29500", "ok"),
        ({"port_taken": "address in use"}, 2, "port 29500", "wrong"),
        ({"no_way_out": "network is unreachable"}, 1, "network", "ok"),
        ({"no_way_out": "network is unreachable"}, 2, "network", "ok"),  # but among themselves one may
        ({"no_way_out": "network is unreachable", "speeds": {}}, 2, "network", "wrong"),
        ({"no_way_out": "network is unreachable", "main": "10.0.0.2"}, 2, "network", "wrong"),
        ({"speeds": {"eth0": 1000}}, 2, "eth0", "slow"),
        ({"speeds": {"eth0": 1000}}, 1, "eth0", "ok"),
        ({"speeds": {"eth0": None}}, 2, "eth0", "ok"),
        ({"infiniband": {"mlx5_0/1": "ACTIVE, 200 Gb/sec (4X HDR)"}}, 2, "mlx5_0/1", "ok"),
        ({"infiniband": {"mlx5_0/1": "DOWN, 40 Gb/sec (4X QDR)"}}, 2, "mlx5_0/1", "slow"),
    ],
)
def test_what_may_be_wrong_with_a_network(changes, machines, subject, state):
    found = network.network_findings(replace(FINE, **changes), machines, {})
    (one,) = [finding for finding in found if finding.subject == subject]
    assert one.state == state
    assert one.mend or state == "ok"


def test_an_interface_that_is_not_there():
    found = only(network.network_findings(FINE, 1, {"GLOO_SOCKET_IFNAME": "ib0"}), "wrong")
    assert "there are lo, eth0" in found.text
    assert "wrong" not in states(network.network_findings(FINE, 1, {"NCCL_SOCKET_IFNAME": "eth"})).values()


def test_a_port_that_is_taken_is_seen():
    with socket.socket() as door:
        door.bind(("0.0.0.0", 0))
        door.listen()
        assert network.seen(door.getsockname()[1]).port_taken
        free = door.getsockname()[1]
    assert not network.seen(free).port_taken


def test_infiniband_ports_are_read(tmp_path):
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "rate").write_text("200 Gb/sec (4X HDR)\n")
    assert network.infiniband_ports(tmp_path) == {"mlx5_0/1": "ACTIVE, 200 Gb/sec (4X HDR)"}
    assert network.infiniband_ports(tmp_path / "none") == {}


# ---- devices

CUDA = Torch("2.13.0+cu124", "12.4", 4, ("gloo", "nccl"), "2.27.5")


def test_cores():
    cores = os.cpu_count()
    texts = {
        "/proc/cpuinfo": "processor : 0\nmodel name\t: AMD EPYC 7763\n",
        "/sys/fs/cgroup/cpu.max": "50000 100000\n",
    }
    found = devices.cpu_findings(texts.get)
    assert "AMD EPYC 7763" in found[0].text and only(found, "slow").subject == "cpu quota"
    old = {
        f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us": f"{value}\n" for name, value in (("quota", 50000), ("period", 100000))
    }
    assert only(devices.cpu_findings(old.get), "slow").text.startswith("the control group (container, job) gives 0.5")
    assert len(devices.cpu_findings({"/sys/fs/cgroup/cpu.max": "max 100000\n"}.get)) == 1
    assert cores == 1 or only(devices.cpu_findings(texts.get, allowed=1)[:1], "slow").subject == "cpu"


def test_gpus_that_run_slowly_are_named():
    a100, rtx = gpus(driver("a100")), gpus(driver("4090"))
    hot = only(devices.gpu_findings(a100, a100, replace(CUDA, gpus=8), (12, 4)), "slow")
    assert hot.subject == "GPU 5" and "too hot" in hot.text and "705 of 1,410 MHz" in hot.text
    found = devices.gpu_findings(rtx, rtx, CUDA, (12, 2))
    slow = [(finding.subject, finding.text.split(",")[0]) for finding in found if finding.state == "slow"]
    assert slow == [
        ("GPU 1", "limited to 300 W"),
        ("GPU 2", "4 of 16 PCIe lanes"),
        ("GPU 3", "PCIe generation 3"),
    ]
    mixed = [a100[0], rtx[0]]
    assert "several kinds" in only(devices.gpu_findings(mixed, mixed, replace(CUDA, gpus=2), None), "slow").text
    broken = [replace(a100[0], errors=2)]
    assert "2 memory errors" in only(devices.gpu_findings(broken, broken, replace(CUDA, gpus=1), None), "wrong").text


def test_mig_is_wrong_for_several_ranks_alone():
    cut = [replace(gpu, mig=True, reasons=0) for gpu in gpus(driver("a100"))[:2]]
    several = devices.gpu_findings(cut, cut, replace(CUDA, gpus=2), (12, 4))
    assert ["MIG" in f.text for f in several if f.state == "wrong"] == [True, True]
    one = devices.gpu_findings(cut, cut[:1], replace(CUDA, gpus=1), (12, 4))
    assert "wrong" not in {f.state for f in one} and any("has one: enough" in f.text for f in one)
    # two GPUs that are cut: CUDA shows one instance, which is no GPU that torch fails to see
    assert "wrong" not in {f.state for f in devices.gpu_findings(cut, cut, replace(CUDA, gpus=1), (12, 4))}


def test_numbers_of_gpus_of_several_kinds_depend_on_the_order_that_cuda_counts_in():
    mixed, torch = [gpus(driver("a100"))[0], gpus(driver("4090"))[0]], replace(CUDA, gpus=2)
    assert only(devices.gpu_findings(mixed, mixed, torch, None), "unknown").mend == "CUDA_DEVICE_ORDER=PCI_BUS_ID"
    by_bus = devices.gpu_findings(mixed, mixed, torch, None, "PCI_BUS_ID")
    assert "unknown" not in {f.state for f in by_bus}
    alike = mixed[:1] * 2
    assert "unknown" not in {f.state for f in devices.gpu_findings(alike, alike, torch, None)}


def test_gpus_that_torch_does_not_see():
    rtx = gpus(driver("4090"))

    def unseen(torch, served=(12, 4)):
        return only(devices.gpu_findings(rtx, rtx[1:3], torch, served)[:1], "wrong")

    blind = replace(CUDA, gpus=0)
    assert "built for CPUs" in unseen(replace(blind, cuda=None)).text
    assert "newer driver" in unseen(replace(blind, cuda="13.0")).mend
    assert "/dev/nvidia" in unseen(blind).mend
    assert "leaves 2 of the driver's 4" in devices.gpu_findings(rtx, rtx[1:3], replace(CUDA, gpus=2), None)[0].text
    assert states(devices.gpu_findings([], [], replace(CUDA, gpus=0), None)) == {"GPUs": "ok"}
    assert states(devices.gpu_findings([], [], replace(CUDA, gpus=8), None)) == {"GPUs": "unknown"}  # of another vendor


# ---- versions and variables

NEEDS = ["torch>=2.11", "numpy>=1.26", "wandb>=0.17; extra == 'trackers'", "pytest>=8; extra == 'dev'"]


def test_versions_are_compared():
    def found(**have):
        return versions.version_findings(CUDA, gpus(driver("a100")), (12, 4), NEEDS, have.get)

    fine = found(torch="2.11.0+cu124", numpy="2.0")
    assert set(states(fine).values()) == {"ok"} and "not installed: wandb (trackers)" in fine[-1].text
    assert "pytest" not in " ".join(map(str, fine))
    assert "550.54.15, serves CUDA up to 12.4" in " ".join(map(str, fine))
    old = only(found(torch="2.9.1", numpy="2.0", wandb="0.21"), "wrong")
    assert (old.subject, old.mend) == ("torch", "pip install 'torch>=2.11'")
    assert only(found(torch="2.13"), "wrong").text == "is not installed"
    assert states(versions.version_findings(CUDA, [], None, None))["packages"] == "unknown"
    for lacking in (replace(CUDA, backends=("gloo",)), replace(CUDA, backends=())):
        assert only(versions.version_findings(lacking, [], None, NEEDS[:0]), "wrong").subject == "backend"


def test_what_is_installed_here_is_what_is_needed():
    found = versions.version_findings(devices.torch_here(), [], None, versions.required())
    assert "wrong" not in states(found).values()


def test_variables_that_slow_a_run_down():
    def found(ranks=2, **environment):
        return variables.variable_findings(environment, 8, ranks)

    assert states(found()) == {"variables": "ok"} == states(found(NCCL_DEBUG="WARN", NCCL_P2P_DISABLE="0"))
    assert only(found(NCCL_DEBUG="info"), "slow").mend == "NCCL_DEBUG=WARN"
    assert only(found(CUDA_LAUNCH_BLOCKING="1"), "slow").mend.startswith("unset CUDA_LAUNCH_BLOCKING")
    assert only(found(OMP_NUM_THREADS="8"), "slow").mend == "unset it, or 4"
    assert states(found(OMP_NUM_THREADS="4")) == {"variables": "ok"}
    assert only(found(RANK="0", WORLD_SIZE="2"), "wrong").mend.startswith("unset RANK WORLD_SIZE")
