"""The documents are run: Python blocks, YAML blocks, commands; paths and links exist; tables are generated."""

import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from side_by_side import parts
from support.forked import python
from support.seconds import budgets, by_folder
from tessera.cli.main import app
from tessera.config.schema import TrainConfig

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- torchrun: (\d+) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
QUICKSTART = ROOT / "docs" / "quickstart.md"
"""Its blocks are files and commands that need one another: they are run in their order, as one."""


def blocks(language: str, documents: list[Path] = DOCUMENTS) -> list:
    found = []
    for document in documents:
        for number, match in enumerate(BLOCK.finditer(document.read_text()), 1):
            if match[2] == language:
                found.append(pytest.param(match[1], match[3], id=f"{document.relative_to(ROOT)}-{number}"))
    return found


@pytest.mark.parametrize("ranks, code", blocks("python", [page for page in DOCUMENTS if page != QUICKSTART]))
def test_python_runs(ranks, code, tmp_path):
    script = tmp_path / "block.py"
    script.write_text(code)
    run = python(script, int(ranks) if ranks else None)
    assert not any(run.codes), run.err


def test_python_runs_as_a_reader_starts_it(tmp_path):
    """The first block of `python` and the first of `torchrun`, with nothing imported for them."""
    every = [block.values for block in blocks("python")]
    for torchrun in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]):
        ranks, code = next(block for block in every if bool(block[0]) == bool(torchrun))
        script = tmp_path / "block.py"
        script.write_text(code)
        words = [sys.executable, *torchrun, *([ranks] if ranks else []), str(script)]
        run = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("_, text", blocks("yaml"))
def test_yaml_is_a_config(_, text, tmp_path):
    from tessera.config.load import load_config

    file = tmp_path / "config.yaml"
    file.write_text(text)
    config, _notes = load_config(file)
    assert set(yaml.safe_load(text)) <= set(type(config).model_fields)


def llama_3_8b(folder: Path) -> Path:
    """A folder with the config.json of a model of Llama 3 8B's sizes."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, **heads}))
    return folder


def test_the_configs_of_the_quick_reference_fit_so_many_processes(tmp_path):
    from tessera.config.load import load_config
    from tessera.train.run import model_of
    from tessera.train.settings import fitting_layout

    model, processes = llama_3_8b(tmp_path / "my-llama"), []
    for block in blocks("yaml", [ROOT / "docs" / "quick-reference.md"]):
        (tmp_path / "config.yaml").write_text(block.values[1])
        config, _notes = load_config(tmp_path / "config.yaml", [f"base_model={model}"])
        fitting_layout(config, model_of(config))
        processes.append(config.world_size)
    assert processes == [1, 1, 8, 8, 8, 16, 8, 32, 32]  # as the page says above each


def test_the_rows_of_the_page_of_formats_are_told_by_their_keys():
    from tessera.data.formats.entry import Entry
    from tessera.data.formats.known import format_of

    page = (ROOT / "docs" / "data-formats.md").read_text()
    sections = re.findall(r"^### ([^\n]+)\n\n```json\n(.*?)```", page, re.MULTILINE | re.DOTALL)
    told = {
        name: [format_of(Entry("rows.jsonl"), "rows.jsonl", json.loads(row), []) for row in rows.splitlines()]
        for name, rows in sections
    }
    assert told == {
        "Text": ["completion"] * 2,
        "Instructions": ["alpaca"] * 2,
        "Chats": ["chat_template"] * 2,
        "Prompt and completion": ["prompt_completion", "chat_pair"],
        "Segments": ["input_output"] * 2,
        "Tokens": ["tokenized"] * 2,
    }


def walk(page: Path) -> str:
    """The blocks of a page as one script of bash: files are written under the name in their first line."""
    lines = ["set -eux"]
    for _, language, text in BLOCK.findall(page.read_text()):
        if language == "bash":
            lines += [line for line in text.splitlines() if not line.startswith("make ")]
        else:
            name = re.match(r"# (\S+)\n", text)[1]
            lines += [f"cat > {name} <<'END OF FILE'", *text.splitlines(), "END OF FILE"]
    return "\n".join(lines)


@pytest.mark.slow
def test_the_quickstart_can_be_walked(tmp_path):
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "bin").mkdir()
    for name, words in {"python": "", "tessera": "-m tessera"}.items():
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        ["bash", "-c", walk(QUICKSTART)], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


@pytest.mark.parametrize("_, text", blocks("bash"))
def test_commands_exist(_, text):
    """Every command is a make target, or a tessera command with options that it has."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        while words and "=" in words[0]:
            words = words[1:]
        if words and words[0] == "make":
            assert set(words[1:]) <= targets, line
        elif words and words[0].endswith("tessera"):
            commands = words[1:3] if words[1] == "config" else words[1:2]
            help_text = tessera_help(*commands)
            for option in (w.partition("=")[0] for w in words[2:] if w.startswith("--")):
                is_key = option[2:].replace("-", "_").partition(".")[0] in TrainConfig.model_fields
                assert option in help_text or is_key and "--set" in help_text, f"{option} of: {line}"


@cache
def tessera_help(*command: str) -> str:
    run = CliRunner().invoke(app, [*command, "--help"], env={"NO_COLOR": "1", "COLUMNS": "200"})
    assert run.exit_code == 0, run.output
    return run.stdout


def headings(document: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    texts = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in texts}


def test_links_lead_somewhere():
    for document in DOCUMENTS:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", document.read_text()):
            file = document.parent / target if target else document
            assert file.exists(), f"{document}: {target}"
            assert not anchor or anchor in headings(file), f"{document}: {target}#{anchor}"


def test_paths_in_backquotes_exist():
    for document in DOCUMENTS:
        for path in re.findall(r"`((?:src|tests|docs|benchmarks)/[\w./-]+)`", document.read_text()):
            assert (ROOT / path).exists(), f"{document}: {path}"


def test_tests_that_are_named_exist():
    named = [pair for document in DOCUMENTS for pair in re.findall(r"(tests/[\w/]+\.py)::(\w+)", document.read_text())]
    assert named
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


def test_the_page_of_examples_names_a_trained_file_or_a_refusal_for_each(tmp_path):
    from config.brought import FILES
    from tessera.config.load import make_config
    from tessera.core.errors import UserError
    from tessera.models.hub import read_model_config
    from train.test_brought import TRAINED

    text = (ROOT / "docs" / "axolotl-examples.md").read_text()
    sections = {
        part.partition("\n")[0]: re.findall(r"(?m)^\| `(.+?)` \| (.+) \|$", part) for part in text.split("\n## ")
    }
    runs = sections.pop("These run")
    named = [name for rows in (runs, *sections.values()) for name, _ in rows]
    assert len({*named}) == len(named) == int(re.search(r"comes with (\d+)", text)[1])
    assert {like for _, like in runs} <= TRAINED.keys() <= FILES.keys()
    refused = 0
    for _, why in chain.from_iterable(sections.values()):
        for asked in re.findall(r"`(\w+: .+?)`", why):
            ((key, value),) = yaml.safe_load(asked).items()
            if key == "sequence_len":
                continue  # the way out
            with pytest.raises(UserError) as caught:
                if key == "model_type":
                    (tmp_path / "config.json").write_text(json.dumps({"model_type": value, "text_config": {}}))
                    read_model_config(tmp_path)
                make_config({"base_model": "m", "datasets": ["a.txt"], key: value})
            assert caught.value.key == key, asked
            refused += 1
    assert refused >= len(named) - len(runs) - 1


def test_every_folder_of_tests_has_a_budget_and_they_make_eleven_minutes():
    assert sorted(budgets()) == sorted(folder for part in parts() for folder in part)
    for part in parts():
        assert sum(budgets()[folder] for folder in part) <= 660


def test_a_folder_above_its_budget_is_told():
    def report(folder, seconds, when="call"):
        return pytest.TestReport(
            f"tests/{folder}/test_x.py::y", ("", 0, ""), {}, "passed", None, when, duration=seconds
        )

    given = [report("nn", 1.0), report("nn", 0.5, "setup"), report("core", 1e6), report("nn", 0.25), "a warning"]
    core, nn, both = by_folder(given)
    assert core.split(maxsplit=5)[3:] == ["tests", "core,", f"above its budget of {budgets()['core']}"]
    assert (nn.split(), both.split()) == (["1.8", "s", "2", "tests", "nn"], ["1000001.8", "s", "3", "tests"])


def test_the_page_of_keys_is_current():
    from tessera.config.describe import keys_page

    assert (ROOT / "docs" / "keys.md").read_text() == keys_page(), "write it again: tessera config keys > docs/keys.md"
