"""The command: on this machine, and on ones that lack something, each made so for a process of its own."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.test_machines import NAMES, network  # noqa: F401
from support.disk import leave_free, small_disk  # noqa: F401
from support.forked import Ended, python
from tessera.config.load import load_config
from tessera.core.errors import RunFailed, UserError
from tessera.core.files import check_target_folder
from tessera.doctor import examine as examining
from tessera.doctor.examine import Asked, examine
from train.runs import environment

MODEL = Path(__file__).parents[2] / "docs" / "figures" / "small"


def doctor(tmp_path: Path, *words: str, first: str = "") -> Ended:
    """As `tessera doctor words...`, in a process in which the script `first` has run."""
    script = tmp_path / "doctor.py"
    command = ["tessera", "doctor", *words]
    script.write_text(f"import sys\n{first}\nsys.argv = {command}\nfrom tessera.cli.main import main\nmain()\n")
    return python(script)


def config(tmp_path: Path, **keys: object) -> Path:
    file = tmp_path / "run.yaml"
    settings = {"base_model": str(MODEL), "datasets": [{"path": "a.txt"}], "output_dir": str(tmp_path / "run")}
    file.write_text(json.dumps(settings | {"micro_batch_size": 8, "sequence_len": 32} | keys))
    return file


def lines(ended: Ended, state: str) -> list[str]:
    return [line.strip() for line in ended.out[0].splitlines() if line.startswith(f"  {state} ")]


def test_links_are_measured_by_processes_of_their_own(tmp_path):
    file = config(tmp_path, tensor_parallel_size=2)
    ended = doctor(tmp_path, str(file), "--json")
    found = json.loads(ended.out[0])
    wrong = [finding for finding in found["findings"] if finding["state"] == "wrong"]
    assert ended.codes == [1 if wrong else 0], ended.err
    (pair,) = found["pairs"]
    assert pair["ranks"] == [0, 1] and pair["bytes_per_second"] > 0 and pair["latency_seconds"] > 0
    (col,) = found["axes"]
    assert col["slowest_bytes_per_second"] == pair["bytes_per_second"] and col["links"] == {"in a machine": 2}
    assert [rank["col"]["sends_to"] for rank in found["ranks"]] == [1, 0]
    sections = {finding["section"] for finding in found["findings"]}
    assert {"devices", "links", "file systems", "clocks", "what makes steps faster or smaller"} <= sections
    assert not (tmp_path / "run").exists(), "the doctor writes nothing"


def test_a_low_ulimit(tmp_path):
    first = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
    ended = doctor(tmp_path, "--no-measure", first=first)
    assert ended.codes == [1]
    (line,) = [line for line in lines(ended, "wrong") if "open files" in line]
    assert "at most 64" in line and "only root may raise it" in line
    assert "open files" in ended.err[0] and "Traceback" not in ended.err[0]


def test_a_namespace_without_network(tmp_path):
    if not hasattr(os, "geteuid") or os.geteuid():
        pytest.skip("only root makes a network namespace")
    first = "import ctypes, os\nif ctypes.CDLL(None, use_errno=True).unshare(0x40000000):\n    os._exit(77)"
    ended = doctor(tmp_path, first=first)
    if ended.codes == [77]:
        pytest.skip("network namespaces are refused here")
    assert ended.codes == [1], ended.err
    (line,) = [line for line in lines(ended, "wrong") if "loopback" in line]
    assert "ip link set lo up" in line
    assert any("no way leads to other machines" in line for line in lines(ended, "ok"))
    assert any("not measured" in line for line in lines(ended, "cannot be told"))
    (several,) = doctor(tmp_path, "--no-measure", "--num-machines", "2", first=first).out
    assert "wrong          network: no way leads" in several


def test_a_full_disk(tmp_path, small_disk):  # noqa: F811
    leave_free(small_disk, 2**20)
    ended = doctor(tmp_path, str(config(tmp_path, output_dir=str(small_disk / "run"))), "--no-measure")
    assert ended.codes == [1]
    (wrong,) = [line for line in lines(ended, "wrong") if str(small_disk) in line]
    assert wrong.split()[1] == "output_dir:" and f"make room on {small_disk}" in wrong


@pytest.mark.parametrize(
    "error", [RunFailed("rank 1 ended with exit code 1"), OSError(errno.ENOSPC, "No space left"), ValueError("cut off")]
)
def test_links_that_cannot_be_measured_are_one_line_of_the_report(monkeypatch, error):
    def fails(*given):
        raise error

    monkeypatch.setattr(examining, "measured", fails)
    report = examine(Asked())
    (found,) = [finding for finding in report.findings if finding.subject == "links"]
    assert found.state == "wrong" and str(error) in found.text and found.mend
    assert len(report.sections) == 9 and report.measured is None
    monkeypatch.setattr(examining, "measured", lambda *given: check_target_folder(Path("/dev/null/x"), "output_dir"))
    with pytest.raises(UserError):
        examine(Asked())


def test_what_a_run_computes_in_and_needs(tmp_path):
    file = config(tmp_path)
    for bf16 in (False, True):
        loaded, _ = load_config(file, [f"bf16={str(bf16).lower()}"])
        report = examine(Asked(loaded, measure=False))
        states = {finding.subject: finding.state for finding in report.findings}
        assert states["bf16"] == ("on" if bf16 else "off")
        (host,) = [finding for finding in report.findings if finding.subject == "host"]
        assert "by formula this run holds" in host.text


def test_a_machine_with_too_few_gpus_or_cores(monkeypatch, tmp_path):
    loaded, _ = load_config(config(tmp_path, tensor_parallel_size=4))
    few = replace(examining.torch_here(), gpus=2)
    monkeypatch.setattr(examining, "torch_here", lambda: few)
    found = {finding.subject: finding for finding in examine(Asked(loaded, here=4, measure=False)).findings}
    assert (
        found["GPUs"].state == "wrong" and "4 ranks are to run on this machine, which has 2 GPUs" in found["GPUs"].text
    )
    monkeypatch.setattr(examining, "cores_here", lambda: 2)
    monkeypatch.setattr(examining, "torch_here", lambda: replace(few, gpus=0))
    found = {finding.subject: finding for finding in examine(Asked(loaded, measure=False)).findings}
    assert found["cores"].state == "slow" and "which has 2 cores" in found["cores"].text
    monkeypatch.setattr(examining, "torch_here", lambda: few)
    report = examine(Asked(loaded, measure=False))
    assert report.placed.here == 2 and "wrong" not in [f.state for f in report.findings if f.subject == "GPUs"]


def test_a_wrong_clock():
    report = examine(Asked(measure=False), now=lambda: 1e9)
    (finding,) = [finding for finding in report.findings if finding.subject == "wall clock"]
    assert finding.state == "wrong" and "2001-09-09" in finding.text and "timedatectl" in finding.mend


def test_mistakes_of_the_user_have_code_2(tmp_path):
    for words in (
        (str(tmp_path / "none.yaml"),),
        (str(config(tmp_path, tensor_parallel_size=3)), "--num-machines", "2"),
        ("--num-machines", "2", "--machine-rank", "1"),
    ):
        ended = doctor(tmp_path, *words, "--no-measure")
        assert ended.codes == [2] and not ended.out[0], ended.err


@pytest.mark.slow
def test_a_slow_cable_between_two_machines_is_measured(network, tmp_path):  # noqa: F811
    """A network of 80 Mb/s carries at most 10 MB a second, however busy this machine is; loopback carries more."""
    limit = ["tc", "-n", NAMES[0], "qdisc", "add", "dev", "tessera0", "root", "tbf", "rate", "80mbit"]
    try:
        limited = subprocess.run([*limit, "burst", "32kb", "latency", "400ms"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("a slow cable needs the command tc")
    if limited.returncode:
        pytest.skip(f"cables cannot be made slow here: {limited.stderr}")
    where = ["--num-machines", "2", "--main-process-ip", "10.99.0.1", "--nproc-per-node", "2", "--json"]
    around = environment() | {"TESSERA_RUN_TOKEN": "0123456789abcdef" * 2}
    started = []
    for rank, name in enumerate(NAMES):
        words = ["ip", "netns", "exec", name, sys.executable, "-m", "tessera", "doctor", *where]
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([*words, "--machine-rank", str(rank)], env=around, **streams))
    told = [process.communicate(timeout=600) for process in started]
    found = json.loads(told[0][0])
    rates: dict[str, list[float]] = {}
    for pair in found["pairs"]:
        rates.setdefault(pair["link"], []).append(pair["bytes_per_second"])
    assert len(rates["network"]) == 4 and len(rates["loopback of one machine"]) == 2, told[1]
    assert max(rates["network"]) < 20e6 < min(rates["loopback of one machine"])
    assert "pairs" not in json.loads(told[1][0]) and "machine 0 says how fast" in told[1][0]
