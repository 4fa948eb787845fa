"""Signals to stop, and terminals that are gone, for a run of one process."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from support.forked import forkserver
from tessera.core.errors import RunFailed
from tessera.launch.watch import StopSignals
from tessera.train.stop import StopRequest, stop_signals, stopped_at_once
from train.runs import Workshop, command, metrics

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_to_stop_asks_a_run(number):
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.asked


def test_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stop_signals()
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_training_ends_in_words(tmp_path, number):
    """What is being written is removed, and what catches every Exception does not keep it."""
    with pytest.raises(RunFailed) as ended, stopped_at_once():
        try:
            (tmp_path / "part").touch()
            try:
                os.kill(os.getpid(), number)
                time.sleep(1)
            except Exception:
                pass
        finally:
            (tmp_path / "part").unlink()
    assert ended.value.exit_code == 128 + number
    assert str(ended.value) == f"stopped by {number.name} before training had begun: no checkpoint was saved"
    assert not list(tmp_path.iterdir())


def test_a_stop_names_the_newest_checkpoint():
    signals = StopSignals(lambda: "run/checkpoint-9")
    signals.seen = [signal.SIGTERM]
    kept = "; the newest whole checkpoint is run/checkpoint-9"
    assert str(signals.error()) == f"stopped: no checkpoint was saved{kept}"
    signals.seen *= 2
    assert str(signals.error()) == f"stopped at the second signal: no checkpoint was saved{kept}"
    assert str(_seen(signal.SIGINT).error()).startswith("stopped before training had begun")


def _seen(*numbers: int) -> StopSignals:
    signals = StopSignals()
    signals.seen = list(numbers)
    return signals


def printing(words: list[str], where: str, errors: Path) -> None:
    """`tessera words...` with stdout closed, full, or read by nobody, or in ASCII."""
    import sys

    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "NO_COLOR": "1"}
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "COLUMNS"):
        os.environ.pop(name, None)
    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
    if where == "closed":
        os.close(1)
        sys.stdout = None  # type: ignore[assignment]
    elif where == "head":
        read, write = os.pipe()
        os.dup2(write, 1)
        os.close(read)
        os.close(write)
    elif where == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    else:
        sys.stdout.reconfigure(encoding="ascii", errors="strict")  # type: ignore[union-attr]
        os.dup2(os.open(errors.with_name("out"), os.O_WRONLY | os.O_CREAT), 1)
    sys.argv = words
    from tessera.cli.main import main

    main()


@pytest.mark.parametrize("where", ["closed", "head", "full", "ascii"])
def test_a_run_outlives_its_terminal(workshop: Workshop, tmp_path, where):
    settings: dict[str, Any] = workshop.settings("llama", tmp_path / "run", max_steps=2)
    words = ["tessera", *command(settings)[3:]]
    process = forkserver().Process(target=printing, args=(words, where, tmp_path / "err"))
    process.start()
    process.join(60)
    err = (tmp_path / "err").read_text()
    assert process.exitcode == 0, err
    assert [m["step"] for m in metrics(settings)] == [1, 2]
    full = "standard output takes nothing more: no space is left on the disk\n"
    assert err == (full if where == "full" else "")
    if where == "ascii":
        assert "effective batch: 3 (micro) x 2 (accumulation)" in (tmp_path / "out").read_text("ascii")
