"""The words of `tessera convert`; what it does is in tests/checkpoint/test_convert.py."""

from pathlib import Path

import pytest

from models.hub_models import save
from tessera.cli.convert import bytes_of
from tessera.cli.main import main
from tessera.core.errors import UserError


@pytest.mark.parametrize(
    ("size", "count"), [("500MB", 500_000_000), ("5GB", 5 * 10**9), ("1.5 gib", 3 << 29), ("700", 700), ("2kB", 2000)]
)
def test_sizes(size, count):
    assert bytes_of(size) == count


@pytest.mark.parametrize("size", ["", "MB", "0", "5 apples", "-1GB", "0.1B"])
def test_what_is_no_size(size):
    with pytest.raises(UserError, match="--max-shard-size"):
        bytes_of(size)


def call(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["tessera", "convert", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_there_and_back_in_small_files(tmp_path: Path, monkeypatch, capsys):
    source = save("llama", tmp_path / "model")
    code, out, _ = call(monkeypatch, capsys, str(source), str(tmp_path / "checkpoint-0"))
    assert code == 0 and "without optimizer state" in out
    options = ("--dtype", "bfloat16", "--max-shard-size", "20kB")
    code, out, _ = call(monkeypatch, capsys, str(tmp_path / "checkpoint-0"), str(tmp_path / "out"), *options)
    assert code == 0 and "in bfloat16, written to" in out
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1


def test_mistakes_end_with_2(tmp_path: Path, monkeypatch, capsys):
    source = save("llama", tmp_path / "model")
    for words, told in {
        (str(tmp_path), str(tmp_path / "out")): "FROM: ",
        (str(source), str(source)): "TO: ",
        (str(source), str(tmp_path / "out"), "--dtype", "int8"): "--dtype: int8",
        (str(source), str(tmp_path / "out"), "--dtype", "float16"): "is for checkpoints",
    }.items():
        code, _, err = call(monkeypatch, capsys, *words)
        assert code == 2 and told in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()
