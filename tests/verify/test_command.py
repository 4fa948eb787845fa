"""`tessera verify` as a shell sees it, and what it refuses before it starts anything."""

import json
import subprocess
import sys

import pytest
import yaml

from support.forked import tessera
from tessera.cli.verify import Asked, verify
from tessera.core.errors import UserError
from train.runs import environment
from verify.verify_cases import save_models, settings

GRID = {"tensor_parallel_mode": "2d", "tensor_parallel_size": 4}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    models = save_models(tmp_path)
    path.write_text(yaml.safe_dump(settings(models["gpt2"], **GRID, sequence_len=48, output_dir=str(tmp_path / "run"))))
    return path


def run(config, *options):
    words = [sys.executable, "-m", "tessera", "verify", str(config), *options]
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)


def test_a_config_is_verified(config, tmp_path):
    """By ranks that the command starts; the others below are started for it."""
    before = sorted(tmp_path.rglob("*"))
    result = run(config, "--json", str(tmp_path / "report.json"))
    assert result.returncode == 0, result.stderr
    assert result.stderr == "" and "\x1b" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    for said in ("gpt2 in miniature", "dropout: embedding 0.1", "2d row 2 × col 2, gather", "1e-12", "all_gather"):
        assert said in result.stdout
    assert "The update of layers.0.attention.k.bias and 1 more is not compared" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] and report["layouts"][0]["numbers"]["float64"]["gradients"] <= 1e-12
    assert {row["axis"] for row in report["layouts"][0]["traffic"]} == {"row", "col", "row·col"}
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "report.json"])


def test_a_config_is_verified_at_full_size(config, tmp_path):
    """The model, the rows and their length are those of the config, and so is the traffic."""
    line = ("--set", "tensor_parallel_mode=1d", "--set", "tensor_parallel_size=2")
    words = (str(config), "--full", *line, "--json", str(tmp_path / "report.json"))
    result = tessera("verify", *words, ranks=2)
    assert (result.codes, result.err) == ([0, 0], ["", ""]) and result.out[1] == ""
    for said in (
        "gpt2 at full size: 6 layers, hidden 96, ffn 384, 8 heads of 12",
        "vocabulary 1000, tied; dropout: embedding 0.1",
        "1 step of 1 micro-batches of 4 rows of 48 tokens",
    ):
        assert said in result.out[0]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] and report["layouts"][0]["numbers"]["float64"]["gradients"] <= 1e-12
    calls = {row["kind"]: row["calls"] for row in report["layouts"][0]["traffic"]}
    assert calls["all_gather"] == 6 * 6 + 3, "six a layer, and those of embedding, head and loss"


def test_a_fault_ends_with_code_1_and_its_name(config):
    """The third collective of a step gathers the embedding's output for q, k and v."""
    result = tessera("verify", str(config), "--inject", "3", ranks=4)
    assert result.codes == [1, 0, 0, 0], "the first has it to tell"
    assert "left out: collective 3 of the step, all_gather over col" in result.out[0]
    assert result.err[0].startswith("2d row 2 × col 2, gather: not the numbers of one process\n")
    assert "parameter: layers.0.attention.q.weight" in result.err[0]
    assert "likely missing: all_gather of X over col (q·k·v, forward)" in result.err[0]
    assert "Traceback" not in result.err[0]


def test_shared_sequences_are_verified_and_said(tmp_path):
    path = tmp_path / "run.yaml"
    keys = {"context_parallel_size": 2, "sample_packing": True, "sequence_len": 48}
    path.write_text(yaml.safe_dump(settings(save_models(tmp_path)["llama"], **keys)))
    result = tessera("verify", str(path), ranks=2)
    assert (result.codes, result.err) == ([0, 0], ["", ""])
    for said in (
        "micro-batches of 3 rows of 11 tokens, each of several documents, then padded",
        "context: 2 ranks = exchange 2: the 8 query heads of a rank allow ulysses 1 or 2, with",
        "1d exchange 2, gather, packed",
        "all_to_all",
    ):
        assert said in " ".join(result.out[0].split())


@pytest.mark.parametrize(
    "asked, said",
    [
        (Asked(inject="all", overrides=["tensor_parallel_size=3"]), "tensor_parallel_size: 3"),
        (Asked(overrides=["tensor_parallel_mode=1d", "tensor_parallel_size=1"]), "tensor_parallel_size: 1"),
        (Asked(all_layouts=1), "--all-layouts: 1"),
        (Asked(inject="0"), "--inject: 0"),
        (Asked(inject="1000"), "--inject: 1000\n  is none of the"),
        (Asked(inject="first"), "--inject: first"),
        (Asked(inject="all", full=True), "--inject: all"),
        (Asked(inject="1", all_layouts=4), "--inject: 1\n  there are 40 layouts"),
        (Asked(overrides=["base_model=nowhere"]), "base_model: nowhere"),
        (Asked(overrides=["sequence_len=65"]), "sequence_len: 65\n  the model has 64 positions"),
    ],
)
def test_mistakes_are_told_before_a_rank_starts(config, asked, said, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tessera.cli.verify.run_workers", lambda *_, **__: pytest.fail("ranks were started"))
    with pytest.raises(UserError) as mistake:
        verify(config, asked)
    assert str(mistake.value).startswith(said)


def test_a_report_needs_a_folder(config, tmp_path):
    with pytest.raises(UserError, match="--json"):
        verify(config, Asked(report=tmp_path / "nowhere" / "report.json"))
