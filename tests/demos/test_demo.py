"""The demonstrations, at small size: what `make demo` and `make demo-memory` run."""

import json

import pytest
from rich.console import Console

from tessera.core.errors import RunFailed, UserError
from tessera.demos import demo
from tessera.demos import memory as demo_memory


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(demo, "TEXT_BYTES", 400_000)
    monkeypatch.setattr(demo, "COMPARED", 2)
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    monkeypatch.setattr(demo, "MODEL", demo.MODEL | small)


def test_the_demo_shows_what_it_promises(small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "demo"
    demo.demo(output, 3)
    shown = capsys.readouterr().out
    for words in ("eval_loss", "unigram entropy", "memory by rank", "communicated by mesh axis", "def "):
        assert words in shown
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "run" / "tokenizer.json").exists() and (output / "run" / "model.safetensors").exists()
    config = json.loads((output / "run" / "config.json").read_text())
    assert config["eos_token_id"] == json.loads((output / "run/prepared/manifest.json").read_text())["eos_token_id"]
    summary = json.loads((output / "run" / "summary.json").read_text())
    assert len(summary["ranks"]) == 2 and sum(r["parameters"] for r in summary["ranks"]) > summary["parameters"]
    demo.clear(output)  # its own folder it may remove
    assert [path.name for path in output.iterdir()] == [demo.MARK]


def test_the_demo_removes_nothing_of_anybody(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something that is no earlier demo"):
        demo.demo(tmp_path, 1)
    assert (tmp_path / "thesis.txt").exists()


def test_a_demo_that_is_stopped_says_so_and_compares_nothing(small, tmp_path, monkeypatch):
    launched = []

    def stopped(config, overrides):
        launched.append(overrides)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')

    monkeypatch.setattr(demo, "launch", stopped)
    with pytest.raises(RunFailed, match=r"stopped after step 2 of its run in .*begins anew"):
        demo.demo(tmp_path, 3)
    assert len(launched) == 1


def test_the_comparison_finds_a_difference():
    same = [{"step": 1, "loss": 2.0, "grad_norm": 1.0}]
    other = [{"step": 1, "loss": 2.0, "grad_norm": 1.001}]
    assert demo.compare(Console(quiet=True), same, same) == 0
    assert demo.compare(Console(quiet=True), other, same) == pytest.approx(1e-3)


def test_the_memory_experiment_at_two_steps(monkeypatch, capsys):
    results = {ranks: demo_memory.run_world(ranks, False, 2) for ranks in (1, 2)}
    assert [r["parameters"] for r in results.values()] == [18_397_184, 9_473_536]
    assert results[2]["peak"] < 0.6 * results[1]["peak"]
    first, every = demo_memory.differences(results)
    assert first <= every <= demo_memory.FIRST_TOLERANCE
    Console(width=80).print(demo_memory.table(results, False))
    shown = capsys.readouterr().out
    assert "18,397,184" in shown and "0.0012-0.0013" in shown and "…" not in shown

    monkeypatch.setattr(demo_memory, "run_world", lambda ranks, causal: results[ranks])
    with pytest.raises(RunFailed, match="the final loss .* is above 0.0013"):
        demo_memory.demo_memory("1,2", False)
    results[2]["losses"][1] *= 1.01
    with pytest.raises(RunFailed, match="more than"):
        demo_memory.demo_memory("1,2", False)


def test_the_memory_experiment_refuses_ranks_that_do_not_divide():
    with pytest.raises(UserError, match="--ranks: 3"):
        demo_memory.demo_memory("3", False)
