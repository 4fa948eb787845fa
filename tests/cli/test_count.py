"""`tessera count`: the table, the files, and the mistakes of a user."""

import json

import pytest
from typer.testing import CliRunner

from tessera.cli.count import Asked, question
from tessera.cli.main import app
from tessera.core.errors import RunFailed, UserError
from tessera.layout.shape import StepShape
from tessera.models.shapes import shape_of

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


def test_a_model_is_the_argument_or_the_option_by_folder_name_or_size(folder, monkeypatch):
    monkeypatch.setattr("tessera.models.hub.download", lambda *_: pytest.fail("the hub was asked"))
    usual = ([8, 16, 64, 512], StepShape(512, 64))
    for asked in (Asked(str(folder)), Asked(model=str(folder))):
        devices, model, shape = question(asked)
        assert (devices, shape) == usual and (model.hidden_size, model.num_layers) == (64, 2)
    for name in ("70B", "meta-llama/Llama-3.1-70B", "llama-3.1-70b"):
        assert question(Asked(name))[1] == question(Asked(model=name))[1] == shape_of("70B")
    assert question(Asked("gpt2", layers=3, batch=4, sequence=8, ranks="2"))[::2] == ([2], StepShape(4, 8))
    assert question(Asked("gpt2"))[1].residual_dropout == 0 and question(Asked())[1].num_layers == 16
    with pytest.raises(UserError, match="already: 7B"):
        question(Asked("7B", model="8B"))
    with pytest.raises(UserError, match=r"8B \(llama-3.1-8b\)"):
        question(Asked("9B"))


def test_of_a_file_it_takes_model_rows_and_devices(folder, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"base_model: {folder}\ndatasets: [{{path: none.txt}}]\nsequence_len: 12\nmicro_batch_size: 2\n"
        "dp_shard_size: 2\ntensor_parallel_size: 2\n"
    )
    result = run(str(config))
    assert result.exit_code == 0, result.exception
    words = " ".join(result.output.split())
    assert "2 layers, hidden 64" in words and "48 tokens (4 × 12)" in words
    assert {row.split()[0] for row in result.output.splitlines() if "1D + SP" in row} == {"4"}
    assert question(Asked(str(config), batch=2, ranks="8"))[::2] == ([8], StepShape(2, 12))


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
