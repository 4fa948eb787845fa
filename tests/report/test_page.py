"""The page: it holds what the files hold, needs nothing beside it, and takes hostile files for what they are."""

import json
import re
from typing import Any

import pytest

from report.made_runs import MACHINES, Elements, make_run, monitored, of_ranks, reported, step, write_lines
from tessera.report.charts import Line, line_chart, stacked_chart
from tessera.report.numbers import GIB, SECONDS, difference, shown, steps_in_short, ticks_shown


def full_run(folder, steps=60):
    """A run with every file."""
    records = [monitored(n) for n in range(1, steps + 1)]
    records[1]["memory"]["kinds_gib"] = {"states": 1.0, "activations": 0.5, "gathered": 0.25, "other": 0.125}
    records[30]["seconds"] |= {"evaluation": 6.0, "save": 12.0}  # of all sixty
    records[29] |= {"eval_loss": 4.5, "eval_ppl": 90.0}
    records[-1] |= {"eval_loss": 4.75, "eval_ppl": 115.6}
    make_run(folder, records, drawn=True, tensor_parallel_size=2, learning_rate=3e-4, dp_shard_size=2)
    start = {"ranks": 4, "mesh": {"shard": 2, "col": 2}, "machines": MACHINES, "device": "cpu (gloo)"}
    ranks = [of_ranks(n, [0.05, 0.05, 0.05, 0.08]) for n in range(1, steps + 1)]
    write_lines(folder / "monitor.jsonl", [start, *ranks])
    events = [
        {"time": 1e9, "step": 0, "kind": "said", "text": "the run begins"},
        {"time": 1e9 + 5, "step": 30, "kind": "warning", "text": "rank 3 is slow: docs/debugging/slow.md"},
        {"time": 1e9 + 9, "step": steps, "kind": "ended", "text": "all steps are done"},
    ]
    write_lines(folder / "events.jsonl", events)
    collectives = [{"axis": "col", "kind": "all_reduce", "calls": 7, "bytes": 4096}]
    (folder / "summary.json").write_text(json.dumps({"parameters": 12345, "ranks": [], "collectives": collectives}))
    for name in ("checkpoint-20", "checkpoint-40"):
        (folder / name).mkdir()
        (folder / name / ".metadata").write_bytes(b"x" * 1000)
        (folder / name / "state.json").write_text(json.dumps({"best": {"checkpoint": 20}}))
    (folder / "LATEST").write_text("checkpoint-40\n")
    return records


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with every file, and its page."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return full_run(folder), reported(folder)


CURVES = {
    "Loss, nats a token": "loss",
    "Learning rate": "learning_rate",
    "Gradient norm": "grad_norm",
    "Tokens a second": "tokens_per_second",
    "MFU": "mfu",
    "Seconds a step": "step_seconds",
}


def test_charts_hold_what_metrics_jsonl_holds(whole):
    records, page = whole
    for title, key in CURVES.items():
        line = page.chart(title)["lines"][0]
        assert line == {"steps": [r["step"] for r in records], "values": [r[key] for r in records]}, title
    assert page.chart("Loss, nats a token")["lines"][1] == {"steps": [30, 60], "values": [4.5, 4.75]}
    layers = page.chart("Seconds a step by term")["lines"]
    sums = [sum(values) for values in zip(*(layer["values"] for layer in layers), strict=True)]
    assert sums == pytest.approx([0.1] * len(records)) and len(layers) == 7
    memory = page.chart("Memory of the fullest rank")["lines"]
    assert [set(line["values"]) for line in memory] == [{2.5}, {1.5}]
    waits = page.chart("Seconds of communication a step")["lines"]
    assert [set(line["values"]) for line in waits] == [{0.015}, {0.005}]


def test_figures_and_tables_hold_what_the_files_hold(whole):
    records, page = whole
    seconds = sum(r["step_seconds"] for r in records)
    speed = sum(r["step_seconds"] * r["tokens_per_second"] for r in records) / seconds
    told = {
        "last loss": f"{records[-1]['loss']:.4g}",
        "last eval_loss": "4.75",
        "last eval_ppl": "115.6",
        "lowest eval_loss": "4.5 step 30",
        "tokens a second": f"{speed:,.0f}",
        "seconds a step": f"{1000 * seconds / len(records):.3g} ms",
        "MFU": "25 %",
        "peak memory": "2.5 GiB",
        "tokens trained on": "6,000",
        "time in steps": f"{seconds:.3g} s",
        "skipped steps": "0",
        "parameters": "12,345",
    }
    for name, value in told.items():
        assert f"{name} {value}" in page.text, name
    for row in (
        "compute 50 ms 50 %",
        "communication over col 15 ms 15 %",
        "a step 100 ms",
        "evaluation, between steps 100 ms —",
        "save, between steps 200 ms —",
        "states 1 GiB 53.3 %",
        "together 1.88 GiB",
        "col 15 ms 1 MB 66.7 MB",
        "col all_reduce 7 4.1 kB",
        "rank 3 on node-b was the slowest at 60 of 60 logging steps, by 20 ms a step",
        "3 node-b 110 ms 37.5 % 2.5 GiB",
        "step 30: rank 3 is slow: docs/debugging/slow.md",
        "all steps are done step 60 of 100",
        "checkpoint-20 best",
        "checkpoint-40 latest",
        "4 ranks · shard 2 × col 2 · cpu (gloo) · node-a, node-b",
    ):
        assert row in page.text, row


def test_the_picture_of_all_ranks_shows_the_slow_one(whole):
    _, page = whole
    heat = next(data for data in page.data if "rows" in data)
    assert heat["names"] == ["rank 0 on node-a", "rank 1 on node-a", "rank 2 on node-b", "rank 3 on node-b"]
    assert heat["steps"] == list(range(1, 61))
    assert heat["rows"] == [[0.0] * 60] * 3 + [[0.375] * 60]
    cells = {a["class"]: a["d"] for name, a in page.elements if name == "path" and str(a.get("class")).startswith("h")}
    assert {name: d.count("M") for name, d in cells.items()} == {"h0": 180, "h4": 60}


def test_the_config_shows_first_what_is_not_at_its_default(whole):
    _, page = whole
    changed, rest = page.text.split("Keys that are not at their defaults")[1].split("The other")
    assert "learning_rate 0.0003" in changed and "tensor_parallel_size 2" in changed
    assert "seed" not in changed and "max_steps 100" in changed and "datasets [{path: text}]" in changed


def test_the_layout_is_drawn(whole):
    _, page = whole
    assert "shard 2 × col 2" in page.text and "layers.0.mlp.up.weight" in page.text
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert ids and all(one.startswith("layout0-") for one in ids)


def test_nothing_is_loaded_from_outside(whole, tmp_path):
    """No attribute that a browser would follow leads out of the page, in no page; nor does the style."""
    other = make_run(tmp_path / "other", [monitored(n) for n in range(1, 9)])
    for page in (whole[1], reported(other, other, output=tmp_path / "both.html")):
        names = {name for name, _ in page.elements}
        assert not names & {"link", "iframe", "object", "embed", "img", "audio", "video", "base", "form", "source"}
        for name, attributes in page.elements:
            for key, value in attributes.items():
                assert key not in ("src", "srcset", "action", "data", "poster", "background"), (name, key)
                assert "href" not in key or str(value).startswith("#"), (name, value)
                assert not key.startswith("on"), (name, key)
                assert "url(" not in str(value) or re.search(r"url\(#[\w-]+\)", str(value)), (name, value)
        assert not re.search(r"https?:|//\w+\.|@import|\burl\((?!#)|xmlns", page.source)
        assert "default-src 'none'" in page.source


def test_the_check_for_outside_references_sees_one():
    page = Elements('<svg><image href="https://example.org/a.png"/></svg>')
    assert any("href" in key and not str(v).startswith("#") for _, a in page.elements for key, v in a.items())


HOSTILE = "</script><script>alert(1)</script><b onload='x'>&amp;\" "


def test_what_files_say_is_never_html(tmp_path):
    records = [monitored(n) for n in range(1, 4)]
    for record in records:
        record["communicated_bytes"] = {HOSTILE: 5}
        record["seconds"]["communication"] = {HOSTILE: 0.5}
        record["slowest"]["machine"] = HOSTILE
    folder = make_run(tmp_path / "<b>run", records, output_dir=HOSTILE)
    config = json.loads((folder / "resolved_config.yaml").read_text()) | {HOSTILE: HOSTILE}
    (folder / "resolved_config.yaml").write_text(json.dumps(config))
    start = {"ranks": 2, "mesh": {HOSTILE: 2}, "machines": [HOSTILE] * 2, "device": HOSTILE}
    write_lines(folder / "monitor.jsonl", [start, of_ranks(1, [0.1, 0.2])])
    write_lines(
        folder / "events.jsonl", [{"time": 1, "step": 1, "kind": k, "text": HOSTILE} for k in ("warning", HOSTILE)]
    )
    collectives = [{"axis": HOSTILE, "kind": HOSTILE, "calls": 1, "bytes": 1}]
    (folder / "summary.json").write_text(json.dumps({"collectives": collectives}))
    page = reported(folder)
    text = (folder / "report.html").read_text()
    assert text.count("<script") == text.count("</script>") == len(page.data) + 1
    assert "<script>alert" not in text and "<b onload" not in text and "<b>run" not in text
    shown_whole = "</script><script>alert(1)</script><b onload='x'>&amp;\""
    assert page.text.count(shown_whole) >= 8  # as it stands there, letter by letter
    assert any(shown_whole in json.dumps(data, ensure_ascii=False).replace('\\"', '"') for data in page.data)


def test_two_runs_stand_side_by_side(tmp_path):
    first = make_run(tmp_path / "one", [monitored(n) for n in range(1, 41)], learning_rate=1e-3)
    slower = [monitored(n) for n in range(1, 21)]
    for record in slower:
        record["seconds"]["compute"], record["loss"] = 0.1, record["loss"] + 1
    second = make_run(tmp_path / "two", slower, learning_rate=2e-3)
    page = reported(first, second)
    lines = page.chart("Loss, nats a token")["lines"]
    assert [len(line["steps"]) for line in lines] == [40, 20]
    assert lines[1]["values"] == [record["loss"] for record in slower]
    assert (page.chart("Loss, nats a token")["from"], page.chart("Loss, nats a token")["to"]) == (1, 40)
    assert "compute 50 ms 50 % 100 ms 66.7 % +100.0 %" in page.text
    differing = page.text.split("Keys that differ")[1].split("Warnings")[0]
    assert "learning_rate 0.001 0.002" in differing and "sequence_len" not in differing
    assert {"Seconds a step by term, A", "Seconds a step by term, B"} <= {
        str(a.get("aria-label")) for name, a in page.elements if name == "svg"
    }


def test_a_machine_that_is_slow_as_a_whole_is_named(tmp_path):
    records = [monitored(n) for n in range(1, 5)]
    for record in records[2:]:
        record["slowest"]["whole_machine"] = True
    text = reported(make_run(tmp_path / "run", records)).text
    assert "rank 3 on node-b was the slowest at 4 of 4 logging steps" in text
    assert "at 2 of them every rank of that machine was slower than all others" in text


def expected(compute: float, **more: Any) -> dict[str, Any]:
    """A prediction as a run writes it."""
    seconds = {"compute": compute, "data": 0.0, "communication": {"col": 0.02}}
    kinds = {"states": 0.75, "activations": 0.25}
    return {"seconds": seconds, "band": 0.15, "kinds_gib": kinds, "profile": "epyc", "measured_here": True} | more


def with_kinds() -> list[dict[str, Any]]:
    """Two lines, the second of which has memory by kind."""
    records = [monitored(1), monitored(2)]
    records[1]["memory"]["kinds_gib"] = {"states": 1.0, "activations": 0.5, "gathered": 0.25, "other": 0.25}
    return records


def test_a_prediction_stands_beside_what_was_measured_where_there_is_one(tmp_path):
    folder = make_run(tmp_path / "run", with_kinds())
    text = reported(folder).text
    assert "predicted" not in text.lower() and "states 1 GiB 50 % activations" in text
    event = {"time": 1e9, "step": 0, "kind": "predicted", "text": "60 ms", "predicted": expected(0.04)}
    again = event | {"step": 1, "predicted": expected(0.03, measured_here=False)}
    for name, content in (("summary.json", {"predicted": expected(0.04)}), ("events.jsonl", event)):
        (folder / name).write_text(json.dumps(content) + "\n")
        text = reported(folder).text
        (folder / name).unlink()
        for row in (
            "compute 50 ms 50 % 40 ms",
            "communication over col 15 ms 15 % 20 ms",
            "optimizer 10 ms 10 % —",
            "a step 100 ms 60 ms ± 15 %",
            "Predicted by the profile epyc, measured on the run's machine.",
            "states 1 GiB 50 % 768 MiB",
            "gathered 256 MiB 12.5 % —",
            "together 2 GiB 1 GiB",
        ):
            assert row in text, row
    write_lines(folder / "events.jsonl", [event, again])  # a run that went on
    text = reported(folder).text
    assert "a step 100 ms 50 ms ± 15 %" in text and "Predicted by the profile epyc, not measured there" in text


def test_two_runs_have_their_predictions_each(tmp_path):
    runs = [make_run(tmp_path / name, with_kinds()) for name in ("one", "two")]
    (runs[1] / "summary.json").write_text(json.dumps({"predicted": expected(0.04)}))
    text = reported(*runs).text
    assert "compute 50 ms 50 % 50 ms 50 % 40 ms same" in text and "a step 100 ms 100 ms 60 ms ± 15 % same" in text
    assert text.count("Predicted by the profile") == 1 and text.count("states 1 GiB 50 % 768 MiB") == 1


def test_a_spike_that_hides_the_rest_makes_the_scale_logarithmic(tmp_path):
    records = [step(n) for n in range(1, 40)]
    assert "logarithmic" not in reported(make_run(tmp_path / "run", records)).text
    records[7]["grad_norm"] = 1e6
    assert "logarithmic" in reported(make_run(tmp_path / "run", records)).text


EXTREMES = [0.0, 1e-99, 1.0, 1.0 + 2**-52, 1e99, -1e99]


@pytest.mark.parametrize("zero", [True, False])
def test_charts_of_any_values_stay_inside(zero):
    for low in EXTREMES:
        for high in EXTREMES:
            line = Line("x", [1, 2, 2**53], [low, high, low], "k0")
            for chart in (line_chart("x", [line], SECONDS, zero=zero), stacked_chart("x", [1, 2, 2**53], [line], GIB)):
                page = Elements(chart)
                (drawn,) = (a["d"] for name, a in page.elements if name == "path" and a["class"] != "grid")
                numbers = [float(n) for n in re.findall(r"[^MLhz ]+", drawn)]
                assert all(0 <= n <= 1000 for n in numbers) and len(page.data) == 1
                assert 1 <= sum(name == "span" for name, _ in page.elements) < 20


def test_numbers_in_words():
    assert [shown(v, SECONDS) for v in (1234.5, 1.5, 0.0123, 2e-6, 0.0)] == [
        "1,234 s",
        "1.5 s",
        "12.3 ms",
        "2 µs",
        "0 s",
    ]
    assert [shown(v, GIB) for v in (2.5, 0.25, float("nan"), None)] == ["2.5 GiB", "256 MiB", "—", "—"]
    assert ticks_shown([0.0, 0.2, 0.4], GIB) == ["0 GiB", "0.2 GiB", "0.4 GiB"]
    assert [steps_in_short(n) for n in (0, 20, 1500, 250_000, 2_000_000)] == ["0", "20", "1,500", "250k", "2M"]
    assert [difference(2.0, 3.0), difference(2.0, 2.0), difference(0.0, 1.0), difference(None, 1.0)] == [
        "+50.0 %",
        "same",
        "—",
        "—",
    ]
