"""`tessera count`: the table, the files, and the mistakes of a user."""

import json

import pytest
from typer.testing import CliRunner

from tessera.cli.main import app
from tessera.core.errors import RunFailed, UserError

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}


def run(*arguments):
    return CliRunner().invoke(app, ["count", *arguments])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "model"


def test_table_and_figure(folder, tmp_path):
    output = tmp_path / "out"
    result = run(
        "--model",
        str(folder),
        "--ranks",
        "4,16",
        "--batch",
        "16",
        "--sequence",
        "8",
        "--layers",
        "1",
        "--output",
        str(output),
    )
    assert result.exit_code == 0, result.exception
    assert "1 layers, hidden 64" in result.output
    assert "16 devices, 1D: cuts num_attention_heads = 8" in result.output
    text = (output / "scale.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    counted = [row for row in rows[2:] if row[3] != "—"]
    assert len(counted) >= 10 and all(row[3] == row[4] for row in counted)
    assert {row[1] for row in rows[2:]} >= {"1D", "1D + SP", "FSDP", "2D", "2.5D", "3D", "best mesh", "SUMMA loop"}
    check_reasons(text, rows[2:])
    assert "GiB" in result.output and "GB" not in result.output + text
    published = [row for row in rows if row[1] == "SUMMA, published"]
    assert [row[0] for row in published] == ["4", "16"] and all(row[3] == "—" != row[4] for row in published)
    assert "<svg" in (output / "scale.svg").read_text()
    assert (output / "scale.png").read_bytes().startswith(b"\x89PNG")


def check_reasons(text, rows):
    """Every row with a "—" has a line below the table that says why, and no other row."""
    given = {tuple(line[2:].partition(": ")[0].split(" devices, ")) for line in text.splitlines() if line[:2] == "- "}
    assert given == {(row[0], row[1]) for row in rows if "—" in row}


def test_without_an_output_nothing_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run("--model", str(folder), "--ranks", "2", "--batch", "4", "--sequence", "8", "--keep").exit_code == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_layouts_whose_devices_share_rows(folder, tmp_path):
    """Rank 0 of 2, which receives most, has 32 of 64 tokens, and heads of 8 features.

    By exchange it receives 5 · 4 elements a token and feature, by Ulysses 4 · (8 + 4) / 2: 4 more.
    """
    sizes = ("--model", str(folder), "--batch", "1", "--sequence", "64", "--layers", "1", "--output", str(tmp_path))
    result = run("--ranks", "2", "--context", *sizes)
    assert result.exit_code == 0, result.exception
    lines = (tmp_path / "scale.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| 2 ")]
    assert [row[1] for row in rows][-3:] == ["Ulysses", "exchange", "ring"]
    check_reasons("\n".join(lines), rows)
    counted = {row[1]: int(row[3].replace(",", "")) for row in rows[-3:]}
    assert counted["Ulysses"] - counted["exchange"] == 4 * 32 * 8


@pytest.mark.parametrize("ranks", ["", "four", "0,8", "8;16"])
def test_ranks_that_are_no_numbers(ranks):
    error = run("--ranks", ranks).exception
    assert isinstance(error, UserError) and error.key == "--ranks" and "8,16,64,512" in str(error)


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    error = run("--output", str(tmp_path / "file")).exception
    assert isinstance(error, UserError) and error.key == "--output"


def test_counts_that_are_not_the_formula_fail_the_command(folder, monkeypatch):
    monkeypatch.setattr("tessera.plan.report.totals", lambda rows: {})
    error = run("--model", str(folder), "--ranks", "2", "--batch", "4", "--sequence", "8").exception
    assert isinstance(error, RunFailed) and "1D on 2 devices" in str(error)


TINY = ("--batch", "2", "--sequence", "8", "--layers", "1", "--ranks", "2")


def test_a_model_is_the_argument_by_folder_name_or_size(folder, monkeypatch):
    monkeypatch.setattr("tessera.models.hub.download", lambda *_: pytest.fail("the hub was asked"))
    by_option, by_argument = run("--model", str(folder), *TINY), run(str(folder), *TINY)
    assert by_option.exit_code == by_argument.exit_code == 0 and by_option.output == by_argument.output
    for name in ("135M", "HuggingFaceTB/SmolLM2-135M", "smollm2-135m"):
        result = run(name, *TINY)
        assert result.exit_code == 0, result.exception
        assert "1 layers, hidden 576, ffn 1536, heads 9 (3 kv), vocabulary 49152; 16 tokens (2 × 8)" in said(result)
    assert isinstance(run(str(folder), "--model", "8B", *TINY).exception, UserError)
    error = run("9B", *TINY).exception
    assert isinstance(error, UserError) and "8B (llama-3.1-8b)" in error.hint


def test_of_a_file_it_takes_model_rows_and_devices(folder, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"base_model: {folder}\ndatasets: [{{path: none.txt}}]\nsequence_len: 12\nmicro_batch_size: 2\n"
        "dp_shard_size: 2\ntensor_parallel_size: 2\n"
    )
    result = run(str(config))
    assert result.exit_code == 0, result.exception
    assert "2 layers, hidden 64" in said(result) and "48 tokens (4 × 12)" in said(result)
    assert {row.split()[0] for row in result.output.splitlines() if "1D + SP" in row} == {"4"}
    assert "8 tokens (2 × 4)" in said(run(str(config), *TINY[:2], "--sequence", "4", "--ranks", "1"))


def test_one_device_receives_nothing_and_a_full_one_is_told(folder, tmp_path):
    output = tmp_path / "out"
    tight = ("--memory", "0.0000001", "--output", str(output))
    result = run(str(folder), "--batch", "2", "--sequence", "8", "--ranks", "1", *tight)
    assert result.exit_code == 0, result.exception
    text = (output / "scale.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| 1 ")]
    check_reasons(text, rows)
    assert next(row for row in rows if row[1] == "1D")[3:6] == ["0", "0", "0"]
    assert "no mesh fits 107 B: the one that holds least, 1·1·1·1, holds " in text


def said(result):
    """What was printed, without the ends of lines."""
    return " ".join(result.output.split())
