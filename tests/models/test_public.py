"""The table of public models: its counts beside the published ones, its names, and what sizes mean."""

import json
import math

import pytest

from tessera.core.errors import UserError
from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.models.anatomy import anatomy_of
from tessera.models.families.table import FAMILIES
from tessera.models.hub import resolve_model_folder
from tessera.models.public import SOURCES, UNITS, models_by_size, public_model, public_models, size_of
from tessera.models.shapes import shape_of

ALONE = Parallel(Mesh(device="meta", rank=0), residual_layout(True))
MODELS = {model.name: model for model in public_models()}


def parameters(config) -> int:
    return sum(math.prod(spec.shape) for _, _, spec in anatomy_of(config).parameters(ALONE))


def agrees(published: str, counted: int) -> bool:
    """Whether a count is the published one: exactly, or rounded to its digits, e.g. "18.4B"."""
    if published.isdecimal():
        return counted == int(published)
    digits = len(published[:-1].partition(".")[2])
    return f"{counted / UNITS[published[-1]]:.{digits}f}" == published[:-1]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("tessera.models.hub.download", refuse)


@pytest.mark.parametrize("name", MODELS)
def test_the_parameters_are_as_many_as_published(name):
    model = MODELS[name]
    assert agrees(model.parameters, parameters(model.config)), f"{parameters(model.config):,}"


def test_a_wrong_size_would_be_seen():
    model = MODELS["llama-3.1-8b"]
    for key, wrong in (("num_hidden_layers", 31), ("num_key_value_heads", 32), ("vocab_size", 128000)):
        changed = type(model)(model.name, (), "", "", (), {**model.content, key: wrong})
        assert not agrees(model.parameters, parameters(changed.config)), key
    assert agrees("13.0B", 13_016_028_160) and not agrees("13.0B", 13_060_000_000)


def test_the_table_is_whole():
    assert len(MODELS) == len(public_models()) >= 60
    names = [name for model in public_models() for name in model.names]
    assert len(names) == len(set(names)), "two rows have one name"
    sizes = [size_of(size) for model in public_models() for size in model.sizes]
    assert len(sizes) == len(set(sizes)) == len(models_by_size()) and None not in sizes
    assert {model.config.family for model in public_models()} == set(FAMILIES)
    assert {model.source for model in public_models()} == set(SOURCES)
    assert all(bool(model.hub) == (model.source == "hub") for model in public_models())


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("meta-llama/Llama-3.1-70B", "llama-3.1-70b"),
        ("META-LLAMA/llama-3.1-70b-instruct", "llama-3.1-70b"),
        ("Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("Llama-3.2-1b", "llama-3.2-1b"),
        ("gpt2", "gpt2"),
        ("7B", "llama-2-7b"),
        ("8b", "llama-3.1-8b"),
        ("13B", "llama-2-13b"),
        ("30B", "llama-1-30b"),
        ("70B", "llama-3.1-70b"),
        ("70.0B", "llama-3.1-70b"),
        ("405B", "llama-3.1-405b"),
        ("1.3B", "gpt3-1.3b"),
        ("175B", "gpt3-175b"),
        ("530B", "megatron-530b"),
        ("1T", "megatron-1t"),
        ("1000B", "megatron-1t"),
        ("500M", "qwen2.5-0.5b"),
    ],
)
def test_names_and_sizes_mean_a_model_without_a_network(name, meant, no_network):
    assert public_model(name) is MODELS[meant]
    assert shape_of(name) == MODELS[meant].config


def test_what_a_row_says_is_read_as_config_json_is():
    config = shape_of("meta-llama/Llama-3.1-8B")
    assert (config.hidden_size, config.num_layers, config.num_kv_heads, config.ffn_size) == (4096, 32, 8, 14336)
    assert config.rope is not None and (config.rope.theta, config.rope.factor) == (500000.0, 8.0)
    assert (
        shape_of("mistral-7b-v0.1").kind_of(0).window == 4096 and shape_of("mistral-7b-v0.3").kind_of(0).window is None
    )
    assert shape_of("qwen3-4b").qk_norm and shape_of("qwen3-4b").head_dim == 128 and shape_of("qwen2.5-7b").qkv_bias
    assert shape_of("175B").rope is None and shape_of("175B").max_positions == 2048 and shape_of("gpt2-xl").tied


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ("9B", "7.5B (megatron-7.5b), 8B (llama-3.1-8b), 12B (mistral-nemo-12b)"),
        ("100B", "123B"),
        ("9999T", "1T"),
        ("1M", "124M"),
    ],
)
def test_a_size_between_is_not_guessed(size, nearest, no_network):
    with pytest.raises(UserError) as caught:
        shape_of(size, "--model")
    assert caught.value.key == "--model" and nearest in caught.value.hint
    assert all(size_of(named.split()[0]) for named in caught.value.hint.removeprefix("nearest: ").split(", "))


@pytest.mark.parametrize("text", ["", "B", "8", "8 B", "-8B", "0B", "1e9B", "٨B", "8.B", "9" * 400 + "B"])
def test_what_is_no_size(text):
    assert size_of(text) is None


def test_a_folder_of_that_name_goes_first(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "8B").mkdir()
    content = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    (tmp_path / "8B" / "config.json").write_text(json.dumps(content))
    assert shape_of("8B").num_layers == shape_of("./8B").num_layers == 3


@pytest.mark.parametrize(
    ("name", "hint"),
    [("70B", "meta-llama/Llama-3.1-70B"), ("qwen3-8b", "Qwen/Qwen3-8B"), ("175B", "a folder with config.json")],
)
def test_weights_need_a_name_of_the_hub(name, hint, monkeypatch):
    monkeypatch.setattr("tessera.models.download.reachable", lambda _: pytest.fail("the hub was asked"))
    with pytest.raises(UserError) as caught:
        resolve_model_folder(name)
    assert caught.value.hint == hint and name in str(caught.value)


def test_a_name_that_is_nowhere_is_told_with_the_nearest(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("tessera.models.download.reachable", lambda _: False)
    with pytest.raises(UserError) as caught:
        shape_of("meta-llama/Llama-3.2-4B")
    assert "llama-3.2-3b" in caught.value.hint
