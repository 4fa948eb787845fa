"""Options of `tessera plan` that do not go together are refused before anything runs."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from tessera.cli.main import app
from tessera.cli.plan_options import WAYS
from tessera.core.errors import UserError
from train.runs import save_model

CONFIG = "run.yaml"  # which need not exist: it is refused before it is read
PLAN, JUDGE = ("8B", "--cluster", "8xH100"), (CONFIG, "--cluster", "8xH100")
MATMUL, TABLES = ("--matmul", "8,8,8"), ("--tables",)
SCALING, TARGET = ("8B", "--scaling", "8,16"), ("8B", "--target-tokens-per-second", "1000")
OF_A_PLAN = (
    ("--sequence-len", "512"),
    ("--global-batch", "8"),
    ("--dtype", "float32"),
    ("--optimizer", "sgd"),
    ("--config", "given.yaml"),
    ("--output", "w.yaml"),
)
OF_A_RANKING = (("--top", "2"), ("--trace", "0"), ("--plot", "p.png"))
PRICED = (("--json",), ("--tokens", "1T"), ("--price", "2"))
WHERE = (("--cluster", "8xH100"), ("--profile", "H100"))
REFUSED = [
    *((PLAN, option) for option in (("--set", "a=1"), ("--devices", "8"))),
    *((TARGET, option) for option in (("--set", "a=1"), ("--devices", "8"))),
    *((JUDGE, option) for option in (*OF_A_PLAN, *OF_A_RANKING, TARGET[1:], SCALING[1:], ("--devices", "8"))),
    *((SCALING, option) for option in (*OF_A_RANKING, *PRICED, TARGET[1:], ("--set", "a=1"), ("--devices", "8"))),
    *((MATMUL, option) for option in (*OF_A_PLAN, *OF_A_RANKING, *PRICED, *WHERE, TARGET[1:], ("--set", "a=1"))),
    *((TABLES, option) for option in (*OF_A_PLAN[:-1], *OF_A_RANKING, *PRICED, *WHERE, MATMUL, ("--devices", "8"))),
]


def refusal(*words):
    result = CliRunner().invoke(app, ["plan", *words])
    assert isinstance(result.exception, UserError), result.output
    return result.exception


@pytest.mark.parametrize(("words", "option"), REFUSED, ids=lambda words: " ".join(words))
def test_an_option_that_would_say_nothing_is_refused(words, option):
    error = refusal(*words, *option)
    assert error.key == option[0] and "says nothing to tessera plan" in error.reason
    assert error.hint.startswith("leave it out; it goes with tessera plan ")


def test_a_model_beside_tables_or_a_product_is_refused():
    assert [refusal("8B", *words).key for words in (MATMUL, TABLES)] == ["MODEL", "MODEL"]


def test_what_needs_another_option_says_so():
    for words in (PLAN, JUDGE, TARGET):
        error = refusal(*words, "--price", "2")
        assert (error.key, error.hint) == ("--price", "add --tokens 1T")
        for price in ("inf", "1e300"):
            assert refusal(*words, "--tokens", "1T", "--price", price).key == "--price"
    error = refusal(*PLAN, "--plot", "p.png", "--trace", "0")
    assert error.key == "--plot" and "--trace 1" in error.hint


def test_a_target_that_cannot_be_written_is_refused_before_the_search(tmp_path):
    for option in ("--output", "--plot"):
        assert refusal(*PLAN, option, str(tmp_path / "missing" / "file")).key == option


def test_every_way_takes_what_names_it():
    named = {"--tables": "tables", "--matmul": "matmul", "CONFIG": "subject", "MODEL": "subject"}
    assert all(name in WAYS[way] for way, name in named.items())


def test_json_has_the_cost_and_the_config_is_written_beside_it(tmp_path):
    folder, out = save_model("llama 64", tmp_path / "model"), tmp_path / "w.yaml"
    words = ("--cluster", "2xH100", "--sequence-len", "64", "--global-batch", "4", "--trace", "0", "--optimizer", "sgd")
    options = ("--json", "--tokens", "1M", "--price", "3", "--output", str(out))
    result = CliRunner().invoke(app, ["plan", str(folder), *words, *options])
    found = json.loads(result.output)
    best = found["choices"][0]
    hours = 1e6 / best["tokens_per_second"] / 3600 * 2
    assert found["device_hours"] == pytest.approx(hours) and found["cost"] == pytest.approx(3 * hours)
    assert yaml.safe_load(out.read_text())["optimizer"] == "sgd"


def test_an_optimizer_that_is_none_is_refused_and_that_of_a_file_is_taken(tmp_path):
    assert refusal(*PLAN, "--optimizer", "adam").key == "--optimizer"
    folder, given = save_model("llama 64", tmp_path / "model"), tmp_path / "given.yaml"
    given.write_text("optimizer: sgd\noptim_args: {momentum: 0.9}\n")
    words = ["plan", str(folder), "--cluster", "1xH100", "--sequence-len", "64", "--global-batch", "1", "--trace", "0"]
    held = {}
    for name, more in {"file": ["--config", str(given)], "none": ["--optimizer", "sgd"], "adamw": []}.items():
        result = CliRunner().invoke(app, [*words, "--json", *more])
        held[name] = json.loads(result.output)["choices"][0]["memory"]["total"]
    assert held["none"] < held["file"] <= held["adamw"]
