"""Folders as they are found: without some files, with half-written or broken ones, growing, or of no run at all."""

import json
import os
import socket
from dataclasses import asdict
from pathlib import Path

import pytest

from report.made_runs import make_run, monitored, of_ranks, reported, step, write_lines
from support.forked import tessera
from tessera.checkpoint.lock import LOCK, STALE, holder
from tessera.checkpoint.lock_file import Owner, boot_id, pid_space
from tessera.cli.report import report
from tessera.core.errors import UserError
from tessera.report.folder import RunFolder
from tessera.report.watch import Page, watch


def looked(folder: Path) -> RunFolder:
    run = RunFolder(folder)
    run.look()
    return run


def test_a_run_from_before_the_monitor_says_what_is_missing(tmp_path):
    folder = make_run(tmp_path / "run", [step(n) for n in range(1, 6)])
    page = reported(folder)
    assert "there is no monitor.jsonl" in page.text and "there is no events.jsonl" in page.text
    assert "Where the time went is not known: no line of metrics.jsonl has seconds" in page.text
    assert page.chart("Loss, nats a token")["lines"][0]["steps"] == [1, 2, 3, 4, 5]
    assert "not running, and not finished" in page.text
    (folder / "resolved_config.yaml").unlink()
    assert "there is no resolved_config.yaml" in reported(folder).text
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="no folder of a run"):
        RunFolder(folder)


def test_a_folder_with_a_config_alone_is_a_run_without_steps(tmp_path):
    folder = make_run(tmp_path / "run", [])
    (folder / "metrics.jsonl").unlink()
    text = reported(folder).text
    assert "there is no metrics.jsonl" in text and "No step is known" in text


def test_lines_that_are_broken_are_counted_and_the_rest_is_read(tmp_path):
    folder = make_run(tmp_path / "run", [])
    lines = [json.dumps(step(n)) for n in range(1, 7)]
    lines[1] = json.dumps(step(2)).replace("4.666666666666667", "NaN")
    lines[2] = '{"step": 3, "loss": null, "grad_norm": Infinity, "skipped_steps": 1}'
    broken = ["{half", "[1, 2]", '"text"', "[" * 100_000, '{"step": "seven"}', '{"step": 1}', "\xff\xfe", ""]
    content = "\n".join([*lines[:3], *broken, *lines[3:], '{"step": 7, "loss": 1.'])
    (folder / "metrics.jsonl").write_text(content, encoding="latin-1")
    run = looked(folder)
    assert run.metrics.curves.points("loss")[0] == [1, 4, 5, 6]
    assert run.metrics.skipped == [2, 3] and run.metrics.last_step == 6
    complaints = " ".join(run.complaints)
    assert "metrics.jsonl: line 4 and 5 more cannot be read" in complaints
    assert "metrics.jsonl: 2 lines have no step, or one that was there before" in complaints
    assert "the last line of metrics.jsonl is not whole" in complaints
    page = reported(folder)
    assert "marks at the top: steps without a finite loss" in page.text and "skipped steps 2 2, 3" in page.text


WRONG = [
    None,
    "text",
    [],
    {},
    True,
    -1,
    10**400,
    1e308,
    1e99,
    5e-324,
    float("nan"),
    [[]],
    {"a": {"b": 1}},
    [1e99, 1e-99],
]


COLLECTIVE = {"axis": "a", "kind": "k", "calls": 1, "bytes": 1}
PREDICTED = {
    "seconds": {"compute": 1.0, "communication": {"col": 1}},
    "kinds_gib": {"states": 1.0},
    "band": 0.1,
    "profile": "here",
    "measured_here": True,
}


@pytest.mark.parametrize("name", ["metrics.jsonl", "monitor.jsonl", "events.jsonl", "summary.json", "state.json"])
def test_no_value_of_another_type_ends_in_a_traceback(name, tmp_path):
    whole = {
        "metrics.jsonl": monitored(1, eval_loss=1.0),
        "monitor.jsonl": of_ranks(1, [0.1, 0.2]) | {"ranks": 2, "mesh": {"col": 2}, "machines": ["a"], "device": "d"},
        "events.jsonl": {"time": 1, "step": 1, "kind": "predicted", "text": "so", "predicted": PREDICTED},
        "summary.json": {"parameters": 1, "collectives": [COLLECTIVE], "predicted": PREDICTED},
        "state.json": {"best": {"checkpoint": 1}},
    }
    records = []
    for key in whole[name]:
        for value in WRONG:
            records.append({"ranks": 2} if name == "monitor.jsonl" else {})
            records.append(whole[name] | {"step": len(records) + 1, key: value})
            if isinstance(whole[name][key], dict):
                records += [whole[name] | {"step": len(records) + 1, key: {k: value}} for k in whole[name][key]]
    folder = make_run(tmp_path / "run", records if name == "metrics.jsonl" else [monitored(1)])
    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / ".metadata").touch()
    (checkpoint / "state.json").write_text("{}")
    if name.endswith(".jsonl"):
        write_lines(folder / name, records)
        assert "Traceback" not in reported(folder).text
        return
    (folder / "resolved_config.yaml").unlink()
    for record in [*records, *WRONG]:
        (folder / "checkpoint-1" / name if name == "state.json" else folder / name).write_text(json.dumps(record))
        looked(folder)
    reported(folder)


@pytest.mark.parametrize("text", ["", "[1]", "key: [", "\t", "base_model: 5", "surprise: 1\nbase_model: x", "\x00"])
def test_a_config_that_cannot_be_read_is_said(text, tmp_path):
    folder = make_run(tmp_path / "run", [step(1)])
    (folder / "resolved_config.yaml").write_text(text)
    page = reported(folder)
    assert "resolved_config.yaml:" in page.text and "No picture: the config cannot be read" in page.text


def test_a_layout_whose_model_is_not_here_is_left_out_with_the_reason(tmp_path):
    folder = make_run(tmp_path / "run", [step(1)], drawn=True, base_model="owner/somewhere-else")
    assert "No picture: base_model is not on this machine" in reported(folder).text
    (folder / "base" / "config.json").rename(folder / "config.json")  # as a run leaves it at its end
    assert "No picture" not in reported(folder).text


def test_a_file_that_is_no_file_is_said(tmp_path):
    folder = make_run(tmp_path / "run", [step(1)])
    os.mkfifo(folder / "monitor.jsonl")
    (folder / "events.jsonl").mkdir()
    text = reported(folder).text
    assert "monitor.jsonl: is no regular file" in text and "events.jsonl: is a folder" in text


def test_only_new_lines_are_read_and_a_file_that_is_replaced_from_its_beginning(tmp_path):
    folder = make_run(tmp_path / "run", [step(1), step(2)])
    run = looked(folder)
    assert not run.look()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step(3)) + "\n" + json.dumps(step(4))[:20])
        file.flush()
        before = run.metrics
        assert run.look() and run.metrics is before and run.metrics.last_step == 3
        assert not run.look()
        file.write(json.dumps(step(4))[20:] + "\n")
    assert run.look() and run.metrics.curves.points("loss")[0] == [1, 2, 3, 4]
    replaced = folder / "new"
    write_lines(replaced, [step(1, loss=9.0), step(2)])
    os.replace(replaced, folder / "metrics.jsonl")
    assert run.look() and run.metrics is not before and run.metrics.curves.points("loss")[1] == [9.0, step(2)["loss"]]


def test_a_resumed_run_takes_the_place_of_the_steps_that_it_does_again(tmp_path):
    folder = make_run(tmp_path / "run", [step(n) for n in range(1, 7)])
    start = {"ranks": 2, "mesh": {"col": 2}, "machines": ["a", "b"], "device": "cpu"}
    first = [of_ranks(n, [0.1, 0.1]) for n in range(1, 6)]
    again = [of_ranks(n, [0.1, 0.3]) for n in range(4, 7)]
    write_lines(folder / "monitor.jsonl", [start, *first, start, *again])
    run = looked(folder)
    assert run.ranks.own.points("1") == ([1, 2, 3, 4, 5, 6], pytest.approx([0.13] * 3 + [0.33] * 3))
    assert not run.ranks.unusable
    write_lines(folder / "monitor.jsonl", [start, *first, start | {"ranks": 3}, of_ranks(4, [0.1] * 3)])
    run.look()
    assert run.ranks.count == 3 and run.ranks.own.points("2")[0] == [4]  # another start, with other ranks


def test_a_line_without_times_still_has_memory(tmp_path):
    """The step that the monitor counts whole has no times."""
    folder = make_run(tmp_path / "run", [step(1), step(2)])
    start = {"ranks": 2, "mesh": {"col": 2}, "machines": ["a", "b"], "device": "cpu"}
    counted = {"step": 2, "memory_now_gib": [1.0, 1.0], "memory_peak_gib": [9.0, 3.0]}
    write_lines(
        folder / "monitor.jsonl", [start, of_ranks(1, [0.1, 0.1]), counted, counted | {"step": 3, "seconds": 5}]
    )
    run = looked(folder)
    assert run.ranks.peak.tolist() == [9.0, 3.0] and run.ranks.own.points("0")[0] == [1]
    assert run.ranks.unusable == 1


def test_why_a_run_failed_stands_above(tmp_path):
    folder = make_run(tmp_path / "run", [step(1)])
    text = "rank 1, step 7, forward: memory ran out\n  see docs/debugging/out-of-memory.md"
    write_lines(folder / "events.jsonl", [{"time": 1.0, "step": 7, "kind": "ended", "text": text}])
    page = reported(folder)
    assert f"the run ended: {' '.join(text.split())}" in page.text
    assert looked(folder).status == "rank 1, step 7, forward: memory ran out"
    resumed = [{"time": 2.0, "step": 7, "kind": "said", "text": "from checkpoint-5"}]
    with (folder / "events.jsonl").open("a") as events:
        events.write(json.dumps(resumed[0]) + "\n")
    assert "the run ended" not in reported(folder).text


def test_of_many_ranks_the_slowest_are_shown(tmp_path):
    folder = make_run(tmp_path / "run", [step(1)])
    seconds = [0.1] * 500
    seconds[321] = 0.2
    write_lines(folder / "monitor.jsonl", [{"ranks": 500, "mesh": {}, "machines": []}, of_ranks(1, seconds)])
    page = reported(folder)
    heat = next(data for data in page.data if "rows" in data)
    assert len(heat["rows"]) == 64 and "rank 321" in heat["names"] and "the slowest 64 of 500 ranks" in page.text


def test_what_a_page_may_not_be_written_over_is_refused(tmp_path):
    folder = make_run(tmp_path / "run", [step(1)])
    before = (folder / "metrics.jsonl").read_bytes()
    empty = tmp_path / "empty"
    empty.mkdir()
    for folders, output, key in (
        ([empty], None, "OUTPUT_DIR"),
        ([tmp_path / "nowhere"], None, "OUTPUT_DIR"),
        ([folder / "metrics.jsonl"], None, "OUTPUT_DIR"),
        ([folder, empty], None, "OUTPUT_DIR"),
        ([folder], folder / "metrics.jsonl", "--output"),
        ([folder], folder, "--output"),
        ([folder], tmp_path / "no" / "page.html", "--output"),
        ([folder], Path("/dev/null"), "--output"),
    ):
        with pytest.raises(UserError) as caught:
            report(folders, output, watching=False)
        assert caught.value.key == key
    assert (folder / "metrics.jsonl").read_bytes() == before and not os.listdir(empty)
    assert not (folder / "report.html").exists() and not (folder / "compared.html").exists()
    reported(folder)
    reported(folder)  # an earlier page is no hindrance


def owner(**changes: object) -> str:
    """The lock of a run that this process holds."""
    own = Owner("id", socket.gethostname(), boot_id(), pid_space(), os.getpid(), "now")
    return json.dumps(asdict(own) | changes)


def test_whose_run_goes_on(tmp_path):
    lock = tmp_path / LOCK
    assert holder(tmp_path) is None
    lock.write_text(owner())
    assert holder(tmp_path).pid == os.getpid()
    lock.write_text(owner(released=True))
    assert holder(tmp_path) is None
    lock.write_text(owner(pid=2**22 + 1))  # above what the kernel gives
    assert holder(tmp_path) is None
    lock.write_text(owner(boot="another machine's", pid=2**22 + 1))
    assert holder(tmp_path) is not None
    long_ago = lock.stat().st_mtime - 2 * STALE
    os.utime(lock, (long_ago, long_ago))
    assert holder(tmp_path) is None


def test_watching_writes_while_the_run_goes_on_and_ends_with_it(tmp_path):
    folder = make_run(tmp_path / "run", [step(1)])
    (folder / LOCK).write_text(owner())
    file, seen = folder / "report.html", []

    def sleep(seconds: float) -> None:
        seen.append((seconds, file.read_text(), file.stat().st_ino))
        if len(seen) == 2:  # nothing has grown before the second look
            with (folder / "metrics.jsonl").open("a") as metrics:
                metrics.write(json.dumps(step(2)) + "\n")
        if len(seen) == 3:
            (folder / LOCK).unlink()

    watch(Page([RunFolder(folder)], file), sleep)
    assert len(seen) == 3 and all(seconds >= 5 for seconds, _, _ in seen)
    assert seen[0][2] == seen[1][2] != seen[2][2]  # written again only when a file has grown
    assert all('data-reload="' in text and "running (process" in text for _, text, _ in seen)
    assert "step 2 of 100" in seen[2][1] and "step 1 of 100" in seen[1][1]
    last = file.read_text()
    assert "data-reload" not in last and "step 2 of 100" in last and "not running" in last


def test_watching_a_run_that_is_over_writes_once(tmp_path):
    folder = make_run(tmp_path / "run", [step(1)])
    watch(Page([RunFolder(folder)], folder / "report.html"), sleep=pytest.fail)
    assert "data-reload" not in (folder / "report.html").read_text()


def test_ctrl_c_leaves_a_page_that_does_not_reload(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", [step(1)])

    def interrupted(made: Page) -> None:
        made.runs[0].look()
        made.write(every=5)
        raise KeyboardInterrupt

    monkeypatch.setattr("tessera.cli.report.watch", interrupted)
    report([folder], None, watching=True)
    assert "data-reload" not in (folder / "report.html").read_text()


def test_the_command_as_a_shell_sees_it(tmp_path):
    first, second = (make_run(tmp_path / name, [step(1)]) for name in ("one", "two"))
    run = tessera("report", str(first), str(second))
    assert run.codes == [0] and "compared.html" in run.out[0], run.err
    assert (first / "compared.html").is_file()
    refused = tessera("report", str(tmp_path))
    assert refused.codes == [2] and "OUTPUT_DIR" in refused.err[0] and "Traceback" not in refused.err[0]
