"""Checkpoints that version 0.1.0 wrote before its rooms were rebuilt (commit 1bd0be2) go on bit for bit.

`written_before/runs.tar.xz` holds, for each of three layouts, the checkpoint after step 3 of 6, what that commit went
on to compute, and the script that made them. Bits of a step depend on the processor: elsewhere numbers are close.
"""

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from train.runs import run

ARCHIVE = Path(__file__).with_name("written_before") / "runs.tar.xz"
LAYOUTS = ("1d", "2d", "fsdp")


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def resumed(before: Path, layout: str, steps: int, output: Path) -> list[dict]:
    """Go on from the checkpoint of `layout` in a folder of its own, to step `steps`."""
    shutil.copytree(before / layout / "checkpoint-3", output / "checkpoint-3")
    settings = yaml.safe_load((before / f"{layout}.yaml").read_text()) | {"output_dir": str(output)}
    settings["base_model"] = str(before / settings["base_model"])
    settings["datasets"] = [{"path": str(before / "rows.jsonl")}]
    return run(settings | {"max_steps": steps, "resume_from_checkpoint": True})


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0].strip(": \t")
    except OSError:
        return ""


def test_the_archive_is_small():
    assert ARCHIVE.stat().st_size < 300_000


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_are_read_bit_for_bit(before, layout, tmp_path):
    resumed(before, layout, 3, tmp_path / "run")
    assert digest(tmp_path / "run") == json.loads((before / f"{layout}.json").read_text())["step 3"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_run_goes_on_as_it_did(before, layout, tmp_path):
    """Moments, the order of rows, dropout masks and the learning rate too: each would change the next steps."""
    expected = json.loads((before / f"{layout}.json").read_text())
    went_on = resumed(before, layout, 6, tmp_path / "run")
    assert [line["step"] for line in went_on] == [4, 5, 6]
    for now, then in zip(went_on, expected["metrics"][3:], strict=True):
        assert (now["learning_rate"], now["tokens"]) == (then["learning_rate"], then["tokens"])
        assert now["loss"] == pytest.approx(then["loss"], rel=1e-6)
        assert now["grad_norm"] == pytest.approx(then["grad_norm"], rel=1e-5)
    weights, then_weights = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", before / layout))
    for name, weight in then_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5)
    if expected["made on"] == [torch.__version__, torch.backends.cpu.get_cpu_capability(), processor()]:
        assert digest(tmp_path / "run") == expected["step 6"]
        assert [line["loss"] for line in went_on] == [line["loss"] for line in expected["metrics"][3:]]
