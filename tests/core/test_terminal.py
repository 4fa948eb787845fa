"""What is printed may get lost, whatever becomes of the terminal; nothing else may."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tessera.cli import main
from tessera.core import terminal
from tessera.core.terminal import Lasting

SOURCE = Path(terminal.__file__).parents[1]
ENVIRONMENT = {"PYTHONPATH": str(SOURCE.parent), "NO_COLOR": "1"}


def in_shell(line: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """A line of bash in which `tessera` is the command; the exit code is that of the command, not of what it fed."""
    shell = f'tessera() {{ "{sys.executable}" -m tessera "$@"; }}; {line}; exit ${{PIPESTATUS[0]}}'
    known = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "COLUMNS")}
    environment = known | ENVIRONMENT | variables
    return subprocess.run(["bash", "-c", shell], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "line", ["tessera config-keys | head -1", "tessera config-keys >&-", "tessera --help | head -1"]
)
def test_a_reader_that_has_gone_is_no_failure(line):
    ended = in_shell(line)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_result_that_the_disk_did_not_take_is_a_failure():
    ended = in_shell("tessera config-keys >/dev/full")
    assert (ended.returncode, ended.stderr) == (1, "standard output takes nothing more: no space is left on the disk\n")


def test_an_error_is_told_by_the_exit_code_where_stderr_takes_none_of_it():
    assert in_shell("tessera train nowhere.yaml 2>/dev/full").returncode == 2
    assert in_shell("tessera train nowhere.yaml >&- 2>&-").returncode == 2


def test_an_encoding_gets_another_character(capsys):
    ended = in_shell("tessera config-keys", PYTHONIOENCODING="ascii")
    assert ended.returncode == 0 and "Traceback" not in ended.stderr
    assert "2 x 2" in "2 × 2".encode("ascii", "tessera.plain").decode()
    assert "loss 1 - norm é → 数 \udcff".encode("ascii", "tessera.plain") == b"loss 1 - norm e -> ? ?"
    terminal.say("a half \udcff of a character")
    assert capsys.readouterr().out == "a half ? of a character\n"


def test_a_closed_descriptor_is_not_given_to_the_next_file(tmp_path):
    script = tmp_path / "opens.py"
    script.write_text(
        "import os, sys\nfrom tessera.core import terminal\n"
        f"with terminal.outlived():\n    file = open({str(tmp_path / 'data')!r}, 'w')\n"
        "    terminal.say('lost')\n    os.write(1, b'lost') and os.write(2, b'lost')\n    sys.exit(file.fileno())\n"
    )
    environment = os.environ | ENVIRONMENT
    ended = subprocess.run(["bash", "-c", f"'{sys.executable}' {script} <&- >&- 2>&-"], env=environment, timeout=60)
    assert ended.returncode > 2 and (tmp_path / "data").read_text() == ""


class Dead:
    """A stream whose reader has gone, or whose file was closed."""

    encoding = "utf-8"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def write(self, *text: str) -> int:
        raise self.error

    flush = isatty = write


@pytest.mark.parametrize("error", [BrokenPipeError(32, "x"), OSError(28, "x"), ValueError("closed"), OSError(5, "x")])
def test_a_dead_stream_raises_nothing(monkeypatch, error):
    monkeypatch.setattr(sys, "stdout", Dead(error))
    monkeypatch.setattr(sys, "stderr", None)
    terminal.say("a", "b")
    terminal.say("a", error=True)
    terminal.console(width=80).print("c")
    print("the stream does raise", file=Lasting(sys.stdout), flush=True)
    with pytest.raises(type(error)):
        print("the stream does raise")


def test_every_word_goes_through_the_one_writer():
    past = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                quiet = any(k.arg == "quiet" for k in node.keywords)
                if called in ("print", "Console", "typer.echo", "click.echo", "os.write") and not quiet:
                    past.append(f"{path.relative_to(SOURCE)}:{node.lineno} {called}")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr"):
                past.append(f"{path.relative_to(SOURCE)}:{node.lineno} {ast.unparse(node)}")
    flushed = {f"launch/rank.py {name}" for name in ("sys.stdout", "sys.stderr")}  # before os._exit
    replaced = {f"{name} sys.stderr" for name in ("launch/debug.py", "doctor/pairs.py")}  # by a Lasting; for stdout
    allowed = flushed | replaced
    assert {f"{p.partition(':')[0]} {p.split()[1]}" for p in past if not p.startswith("core/terminal.py")} <= allowed


@pytest.mark.parametrize(
    "error, told",
    [
        (PermissionError(13, "x", "out/scale.md"), "out/scale.md: permission denied\n"),
        (
            FileNotFoundError(2, "x", "gone/a"),
            "gone/a: the folder gone is not there (any more)\n",
        ),
        (MemoryError("Unable to allocate 2.00 GiB for an array"), "memory ran out on the host: 2 GiB asked for, "),
    ],
)
def test_errors_of_the_system_are_told_in_a_line(monkeypatch, capsys, error, told):
    def fail() -> None:
        raise error

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit) as ended:
        main.main()
    err = capsys.readouterr().err
    assert ended.value.code == 1 and err.startswith(told) and err.count("\n") == 1
