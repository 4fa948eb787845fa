"""Memory that runs out in each phase of a run: what is told, and what the keys it names do."""

import errno
import os
import re
import resource
import shlex
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from support.forked import forkserver
from tessera.config.schema import TrainConfig
from tessera.core.exhausted import host_bytes_free, kernel_kills, memory_in_words, ran_out
from tessera.core.text import human
from tessera.plan.count import counted_step
from tessera.train.less_memory import held_bytes, less_memory
from tessera.train.run import model_of
from train.memory_cases import limited
from train.runs import Workshop, command, environment

CPU = torch.device("cpu")


def ended(settings: dict[str, Any], phase: str, tmp_path: Path) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of a run that may allocate next to nothing more in `phase` of step 3."""
    said = tmp_path / "out", tmp_path / "err"
    process = forkserver().Process(target=limited, args=(command(settings)[3:], phase, said))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode, said[0].read_text(), said[1].read_text()


@pytest.mark.parametrize("phase", ["forward", "backward", "optimizer"])
def test_an_allocation_that_fails_is_told_with_its_phase(workshop: Workshop, tmp_path, phase):
    settings = workshop.settings("llama", tmp_path / "run", save_steps=2, micro_batch_size=4, save_async=False)
    code, _, err = ended(settings, phase, tmp_path)
    lines = err.splitlines()
    assert code == 1 and "Traceback" not in err, err
    assert lines[0].startswith(f"rank 0, step 3, {phase}: memory ran out on the host: 16 GiB asked for, ")
    assert lines[0].endswith(" free") and lines[1] == f"  the newest whole checkpoint is {tmp_path}/run/checkpoint-2"
    assert lines[2].startswith("  what lowers the peak of a rank most (by formula it holds ")
    assert len(lines) == 6 and all(" less " in line for line in lines[3:])


def test_a_copy_for_a_save_that_finds_no_memory(workshop: Workshop, tmp_path):
    """That save is not made, and training goes on; at its end the last one decides."""
    settings = workshop.settings("llama", tmp_path / "run", save_steps=3, max_steps=4)
    code, out, err = ended(settings, "save", tmp_path)
    told = "checkpoint-3 was not saved: memory ran out on the host: 16 GiB asked for, "
    assert told in out and "for copies of 552 KiB; save_async: false needs none; there is no whole checkpoint" in out
    assert "Traceback" not in err and (tmp_path / "run/model.safetensors").exists()
    assert code == 0 or (code == 1 and "save_async: false" in err)


def test_a_rank_that_is_killed_says_where_it_was(workshop: Workshop, tmp_path):
    from tessera.launch.outcome import describe
    from tessera.train.where import Where, where_was

    with patch.dict(os.environ, {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}):
        where = Where()
    where.enter("data", 12)
    where.enter("backward")
    where.enter("save")
    where.close()
    failure = type("Failure", (), {"pid": 7, "exitcode": -9, "error_file_data": {}})
    was = where_was(tmp_path / "error.json")
    text, code, again = describe(1, failure(), was=was, memory=lambda: ["  memory ran out: the kernel killed it"])
    assert text == "rank 1 (process 7) in step 12, save, was killed by SIGKILL\n  memory ran out: the kernel killed it"
    assert (code, again) == (1, True) and signal.SIGKILL == 9


@pytest.fixture
def small_group(tmp_path) -> Iterator[Path]:
    """A memory control group of 700 MB."""
    root = Path("/sys/fs/cgroup")
    first = (root / "memory").is_dir()
    group = root / ("memory" if first else "") / f"tessera-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(700 * 2**20))
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield group
    group.rmdir()


@pytest.mark.slow
def test_a_rank_that_the_kernel_kills_for_memory(workshop: Workshop, tmp_path, small_group):
    own = {"tensor_parallel_size": 2, "micro_batch_size": 20000, "random_init": True}
    words = command(workshop.settings("llama", tmp_path / "run", **own))
    shell = f"echo $$ > {small_group}/cgroup.procs; exec {shlex.join(words)}"
    ended = subprocess.run(["bash", "-c", shell], env=environment(), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert re.match(
        r"rank [01] \(process \d+\) in step 1, (data|forward|backward), was killed by SIGKILL\n", ended.stderr
    )
    assert "  memory ran out: the kernel killed it\n  what lowers the peak of a rank most" in ended.stderr


# ---- Which errors mean it


@pytest.mark.parametrize(
    "error, asked",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total"), "20 MiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error"), "4 KiB"),
        (MemoryError("Unable to allocate 1.50 GiB for an array with shape (1,)"), "1.5 GiB"),
        (MemoryError(), None),
        (RuntimeError("std::bad_alloc"), None),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None),
    ],
)
def test_errors_that_mean_it(error, asked):
    assert ran_out(error)
    told = memory_in_words(error, CPU)
    assert told.startswith("memory ran out on the host") and told.endswith(" free")
    assert (f": {asked} asked for, " in told) if asked else "asked" not in told


@pytest.mark.parametrize("error", [RuntimeError("shape [2] is invalid"), OSError(28, "x"), ValueError("memory")])
def test_errors_that_do_not(error):
    assert not ran_out(error)


def test_what_is_free_heeds_every_limit(monkeypatch):
    free = host_bytes_free()
    assert free is not None and 2**20 < free < 2**45
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (used + 2**20, used + 2**20))
    assert host_bytes_free() <= 2**20 + 2**18  # type: ignore[operator]
    assert kernel_kills() >= 0


# ---- What is advised


def config_of(workshop: Workshop, **changes: Any) -> tuple[TrainConfig, Any]:
    config = TrainConfig.model_validate(workshop.settings("llama", Path("x"), **changes))
    return config, model_of(config)


def test_three_keys_with_their_effect(workshop: Workshop):
    """The effect of each is that of the formula with the key set, the greatest first."""
    config, model = config_of(workshop, micro_batch_size=64, gradient_accumulation_steps=1)
    heading, *lines = less_memory(config, model, torch.float32)
    now = held_bytes(config, model, torch.float32, False)
    changes = {
        "tensor_parallel_size: 2": {"tensor_parallel_size": 2},
        "gradient_checkpointing: true": {"gradient_checkpointing": True},
        "sequence_len: 8": {"sequence_len": 8},
    }
    for line, (written, change) in zip(lines, changes.items(), strict=True):
        less = now - held_bytes(config.model_copy(update=change), model, torch.float32, False)
        assert written in line and f" {human(less)} less" in line, lines


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"micro_batch_size": 4}, {"sequence_len": 8}])
def test_the_formula_falls_as_the_counted_peak_does(workshop: Workshop, change):
    """Against a step that is run on fake tensors: each key lowers both, to within a third of one another."""
    from tessera.core.mesh import Mesh
    from tessera.train.settings import parallel_for, step_shape

    def both(config: TrainConfig, model: Any) -> tuple[int, int]:
        parallel = parallel_for(config, model, Mesh(config.mesh_sizes, "meta", rank=0))
        peak = counted_step(model, step_shape(config, parallel), parallel).memory.peak
        return held_bytes(config, model, torch.float32, False), peak

    large = {"micro_batch_size": 8, "sequence_len": 16, "gradient_accumulation_steps": 1}
    (formula, peak), (less, lower) = both(*config_of(workshop, **large)), both(*config_of(workshop, **large | change))
    assert less < formula and lower < peak
    print(formula, peak, less, lower)
    assert formula - less == pytest.approx(peak - lower, rel=1 / 3)


def test_copies_of_a_save_count_where_they_lie(workshop: Workshop):
    config, model = config_of(workshop)
    lines = less_memory(config, model, torch.float32, copies=True)
    assert any(line.split()[:2] == ["save_async:", "false"] for line in lines), lines
    assert not any("save_async" in line for line in less_memory(config, model, torch.float32))


@pytest.mark.parametrize(
    ("gpus", "has", "named"),
    [
        (0, {"gradient_checkpointing": "selective", "tiled_mlp": True}, "gradient_checkpointing: true"),
        (0, {"gradient_checkpointing": True, "bf16": True}, "tiled_mlp: true"),
        (1, {"gradient_checkpointing": True, "tiled_mlp": True}, "gradient_checkpointing: offload"),
    ],
)
def test_savers_are_named_where_they_apply(workshop: Workshop, monkeypatch, gpus, has, named):
    """Host memory takes what layers keep from a GPU alone; of a wide MLP tiles leave a part."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config, model = config_of(workshop, **{"micro_batch_size": 1, "sequence_len": 4096, "dp_shard_size": 2} | has)
    model = replace(model, ffn_size=512, num_layers=32, max_positions=4096)
    lines = less_memory(config, model, torch.float32)
    assert any(named in line for line in lines), lines
    assert gpus or not any("offload" in line for line in lines)
