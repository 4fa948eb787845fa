"""Keys of the command line over those of the file."""

import pytest

from tessera.config.load import resolve_config
from tessera.config.show import shown
from tessera.core.errors import UserError

FILE = """
base_model: m
datasets: [{path: a.txt}, {path: b.txt, type: alpaca}]
lr: 1e-4
seed: 7
fsdp_config: {fsdp_offload_params: false}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("seed=8", ["seed"], 8),
        ("datasets.0.path=c.txt", ["datasets", 0, "path"], "c.txt"),
        ("datasets[1].path=c.txt", ["datasets", 1, "path"], "c.txt"),
        ("datasets.2.path=c.txt", ["datasets", 2, "path"], "c.txt"),
        ("datasets=./c.txt", ["datasets", 0, "path"], "./c.txt"),
        ("fsdp_config.reshard_after_forward=false", ["fsdp_config", "reshard_after_forward"], False),
        ("fsdp_config.offload_params=true", ["fsdp_config", "offload_params"], True),
        ("fsdp_config.fsdp_offload_params=true", ["fsdp_config", "offload_params"], True),
        ("tensor_parallel_mesh.col=2", ["tensor_parallel_mesh", "col"], 2),
        ("tokenizer.train=bpe", ["tokenizer", "train"], "bpe"),
        ("learning_rate=2e-3", ["learning_rate"], 2e-3),
        ("lr=2e-3", ["learning_rate"], 2e-3),
        ("ddp_timeout=120", ["group_timeout_minutes"], 2),
        ("optim=adamw_torch", ["optimizer"], "adamw_torch"),
    ],
)
def test_a_key_of_any_depth_is_replaced(file, override, place, value):
    more = ["tokenizer.vocab_size=300"] if override.startswith("tokenizer") else []
    found = resolve_config(file, [override, *more]).config
    for part in place:
        found = found[part] if isinstance(part, int) else getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("datasets.5.path=x", "datasets has 2 entries, which are counted from 0\n  write datasets.2 to add one"),
        ("datasets.path=x", "datasets is a list\n  write datasets.0.path"),
        ("seed.x=1", "seed holds no keys\n  write seed=… with its whole value"),
        ("datasets.0.pth=x", "nearest: path"),
        ("max_steps", "is not key=value"),
        ("=3", "is not key=value"),
        (".=3", "is not key=value"),
        ("a." * 50 + "b=3", "is not key=value"),
    ],
)
def test_places_that_are_not_there(file, override, said):
    with pytest.raises(UserError) as caught:
        resolve_config(file, [override])
    assert said in str(caught.value)


def test_a_list_of_paths_takes_keys_of_one(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("base_model: m\ndatasets: ./a.txt\n")
    assert resolve_config(path, ["datasets.0.field=t"]).config.datasets[0].field == "t"


def test_what_is_shown_is_the_config_and_where_it_comes_from(file, tmp_path):
    resolved = resolve_config(file, ["seed=9", "datasets.0.path=c.txt", "fsdp_config.sharding_strategy=SHARD_GRAD_OP"])
    text = shown(resolved)
    (tmp_path / "again.yaml").write_text(text)
    assert resolve_config(tmp_path / "again.yaml").config == resolved.config
    origins = dict(line.split("  # ") for line in text.splitlines() if "  # " in line)
    origins = {line.partition(":")[0].strip(): origin for line, origin in origins.items()}
    assert origins["seed"] == origins["datasets"] == "command line"
    assert origins["learning_rate"] == "file, as lr" and origins["base_model"] == "file"
    assert origins["reshard_after_forward"] == "command line, as fsdp_config.sharding_strategy"
    assert (origins["offload_params"], origins["forward_prefetch"], origins["bf16"]) == ("file", "default", "default")
    assert text.startswith("# lr is called learning_rate here\n")


def test_of_a_data_set_what_was_given_is_shown(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("base_model: m\ndatasets:\n  - {path: a.csv, type: {format: '{instruction}'}}\n  - {path: b}\n")
    text = shown(resolve_config(path))
    (line,) = (line for line in text.splitlines() if line.startswith("datasets: "))
    assert line == "datasets: [{path: a.csv, type: {format: '{instruction}'}}, {path: b}]  # file"
    before = resolve_config(path).config
    path.write_text(text)
    assert resolve_config(path).config == before
