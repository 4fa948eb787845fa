"""config.json of each family against transformers' reading of it; the table of names against its models."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tessera.core.errors import UserError
from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.models.config import LayerKind, ModelConfig
from tessera.models.decoder import Decoder
from tessera.models.families.stored import stored_tensors
from tessera.models.families.table import FAMILIES, model_config
from tessera.nn.parameter import named_specs
from tessera.nn.rope import RopeConfig, rope_frequencies

FILE = Path("some/config.json")
LLAMA = {"model_type": "llama"}
GPT2 = {"model_type": "gpt2"}
QWEN2 = {"model_type": "qwen2"}
MISTRAL = {"model_type": "mistral"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def read(content: object) -> ModelConfig:
    return model_config(content, FILE)


def as_llama(theirs: transformers.LlamaConfig) -> ModelConfig:
    """What a LlamaConfig means, attribute by attribute."""
    return ModelConfig(
        family="llama",
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        num_layers=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        num_kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        ffn_size=theirs.intermediate_size,
        max_positions=theirs.max_position_embeddings,
        norm="rms",
        norm_eps=theirs.rms_norm_eps,
        activation=theirs.hidden_act,
        gated=True,
        rope=RopeConfig(theirs.rope_parameters["rope_theta"]),
        qkv_bias=theirs.attention_bias,
        attention_out_bias=theirs.attention_bias,
        mlp_bias=getattr(theirs, "mlp_bias", False),  # Qwen 3 has none
        tied=theirs.tie_word_embeddings,
        attention_dropout=theirs.attention_dropout,
        initializer_range=theirs.initializer_range,
    )


def as_qwen2(theirs: transformers.Qwen2Config) -> ModelConfig:
    """What a Qwen2Config means: Llama with biases on q, k and v, and no width of a head but that of the sizes."""
    head_dim = theirs.hidden_size // theirs.num_attention_heads
    return dataclasses.replace(near_llama(theirs, head_dim), family="qwen2", qkv_bias=True)


def as_mistral(theirs: transformers.MistralConfig) -> ModelConfig:
    """What a MistralConfig means: Llama within a window."""
    kinds = (LayerKind(theirs.sliding_window),)
    return dataclasses.replace(near_llama(theirs, theirs.head_dim), family="mistral", layer_kinds=kinds)


def near_llama(theirs: transformers.PreTrainedConfig, head_dim: int) -> ModelConfig:
    same = copy.deepcopy(theirs)
    same.head_dim, same.attention_bias, same.mlp_bias = head_dim, False, False  # whatever they are: nobody reads them
    return as_llama(same)


def as_gpt2(theirs: transformers.GPT2Config) -> ModelConfig:
    """What a GPT2Config means, attribute by attribute."""
    return ModelConfig(
        family="gpt2",
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.n_embd,
        num_layers=theirs.n_layer,
        num_heads=theirs.n_head,
        num_kv_heads=theirs.n_head,
        head_dim=theirs.n_embd // theirs.n_head,
        ffn_size=theirs.n_inner or 4 * theirs.n_embd,
        max_positions=theirs.n_positions,
        norm="layer",
        norm_eps=theirs.layer_norm_epsilon,
        activation={"gelu_new": "gelu_tanh", "gelu": "gelu"}[theirs.activation_function],
        gated=False,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tied=theirs.tie_word_embeddings,
        embedding_dropout=theirs.embd_pdrop,
        attention_dropout=theirs.attn_pdrop,
        residual_dropout=theirs.resid_pdrop,
        initializer_range=theirs.initializer_range,
    )


UNLIKE_LLAMA_DEFAULTS = {
    "vocab_size": 509,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 77,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "attention_dropout": 0.25,
    "initializer_range": 0.5,
    "rope_theta": 500.0,
}
UNLIKE_GPT2_DEFAULTS = {
    "vocab_size": 509,
    "n_embd": 48,
    "n_inner": 56,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 77,
    "activation_function": "gelu",
    "layer_norm_epsilon": 1e-6,
    "embd_pdrop": 0.25,
    "attn_pdrop": 0.35,
    "resid_pdrop": 0.45,
    "tie_word_embeddings": False,
    "initializer_range": 0.5,
}


def test_missing_keys_take_the_defaults_of_transformers():
    assert read(LLAMA) == as_llama(transformers.LlamaConfig())
    assert read(GPT2) == as_gpt2(transformers.GPT2Config())
    qwen3 = as_llama(transformers.Qwen3Config())
    assert read({"model_type": "qwen3"}) == dataclasses.replace(qwen3, family="qwen3", qk_norm=True)

    assert read(QWEN2) == as_qwen2(transformers.Qwen2Config())
    assert read(MISTRAL) == as_mistral(transformers.MistralConfig())


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_attention_within_a_window_is_refused(family):
    with pytest.raises(UserError, match="use_sliding_window"):
        read({"model_type": family, "use_sliding_window": True})
    kinds = {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}
    with pytest.raises(UserError, match="layer_types.*\n.*sliding_attention"):
        read({"model_type": family} | kinds)
    assert read({"model_type": family} | kinds | {"layer_types": ["full_attention"] * 2}).num_layers == 2


UNLIKE_NEAR_LLAMA = {
    **{key: value for key, value in UNLIKE_LLAMA_DEFAULTS.items() if not key.endswith("_bias")},
    "sliding_window": 33,
}


@pytest.mark.parametrize("key", UNLIKE_NEAR_LLAMA)
def test_every_key_of_a_family_near_llama_arrives(key):
    given = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6, key: UNLIKE_NEAR_LLAMA[key]}
    assert read(MISTRAL | given) == as_mistral(transformers.MistralConfig(**given))
    assert read(MISTRAL | given) != read(MISTRAL)
    if key not in ("head_dim", "sliding_window"):
        assert read(QWEN2 | given) == as_qwen2(transformers.Qwen2Config(**given))
        assert read(QWEN2 | given) != read(QWEN2)


def test_a_window_that_is_null_is_none_and_one_that_is_absent_is_that_of_transformers():
    assert read(MISTRAL | {"sliding_window": None}).kind_of(0) == LayerKind(None)
    assert read(MISTRAL).kind_of(0) == LayerKind(transformers.MistralConfig().sliding_window)


def test_kv_heads_that_are_null_are_as_many_as_query_heads():
    given = QWEN2 | {"num_attention_heads": 16, "num_key_value_heads": None}
    theirs = transformers.AutoConfig.for_model(**given)
    assert read(given).num_kv_heads == theirs.num_key_value_heads == 16


@pytest.mark.parametrize("family", [QWEN2, MISTRAL])
def test_biases_are_the_family_s_whatever_keys_say(family):
    assert read(family | {"attention_bias": True, "mlp_bias": True}) == read(family)


@pytest.mark.parametrize("key", UNLIKE_LLAMA_DEFAULTS)
def test_every_llama_key_arrives(key):
    # hidden_size and heads without a head_dim must divide, so each is changed beside what makes it fit
    given = {"hidden_size": 48, "num_attention_heads": 6, key: UNLIKE_LLAMA_DEFAULTS[key]}
    assert read(LLAMA | given) == as_llama(transformers.LlamaConfig(**given))
    assert read(LLAMA | given) != read(LLAMA)


@pytest.mark.parametrize("key", UNLIKE_GPT2_DEFAULTS)
def test_every_gpt2_key_arrives(key):
    given = {key: UNLIKE_GPT2_DEFAULTS[key]}
    assert read(GPT2 | given) == as_gpt2(transformers.GPT2Config(**given))
    assert read(GPT2 | given) != read(GPT2)


def test_what_transformers_writes_is_read_the_same():
    llama = transformers.LlamaConfig(**UNLIKE_LLAMA_DEFAULTS)
    assert read(llama.to_dict()) == as_llama(llama)
    gpt2 = transformers.GPT2Config(**UNLIKE_GPT2_DEFAULTS)
    assert read(gpt2.to_dict()) == as_gpt2(gpt2)
    own = {key: value for key, value in UNLIKE_NEAR_LLAMA.items() if key not in ("head_dim", "sliding_window")}
    qwen2, mistral = transformers.Qwen2Config(**own), transformers.MistralConfig(**UNLIKE_NEAR_LLAMA)
    assert read(qwen2.to_dict()) == as_qwen2(qwen2) and read(mistral.to_dict()) == as_mistral(mistral)


def test_gpt2_keys_by_their_common_names():
    given = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "max_position_embeddings": 77,
    }
    assert read(GPT2 | given) == as_gpt2(transformers.GPT2Config(**given))


def test_nulls_count_as_absent():
    nulls = {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None, "quantization_config": None}
    assert read(LLAMA | nulls) == read(LLAMA)
    assert read(GPT2 | {"n_inner": None}) == read(GPT2)


@pytest.mark.parametrize(
    "given",
    [
        {"rope_scaling": LLAMA3, "rope_theta": 500.0},
        {"rope_scaling": {**LLAMA3, "type": "llama3"}, "rope_theta": 500.0},
        {"rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("original")}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}, "rope_theta": 300.0},
        {"rope_parameters": LLAMA3, "original_max_position_embeddings": 32},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_scaling": {"type": "default"}, "rope_theta": 500.0},
        {"rope_theta": 500.0},
    ],
    ids=lambda given: "+".join(given),
)
def test_rope_frequencies_are_those_of_transformers(given):
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 128}
    copied = copy.deepcopy(LLAMA | sizes | given)  # transformers changes what it is given
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig.from_dict(copied)).inv_freq
    rope = read(LLAMA | sizes | given).rope
    assert rope is not None
    ours = rope_frequencies(32, rope)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    plain = rope_frequencies(32, read(LLAMA).rope)
    assert (ours / plain - 1).abs().max() > 0.1  # reading nothing of it would show


BAD = {
    "unknown family": ({"model_type": "bert"}, "model_type", ["bert", "gpt2", "llama"]),
    "no family": ({"hidden_size": 4}, "model_type", ["missing", "gpt2, llama"]),
    "no object": ([1], "base_model", ["not a JSON object"]),
    "size is text": (LLAMA | {"hidden_size": "4k"}, "hidden_size", ["4k", "whole number"]),
    "size is zero": (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers", ["0", "at least 1"]),
    "size is true": (GPT2 | {"n_layer": True}, "n_layer", ["whole number"]),
    "flag is text": (LLAMA | {"mlp_bias": "no"}, "mlp_bias", ["true or false"]),
    "dropout of all": (LLAMA | {"attention_dropout": 1.0}, "attention_dropout", ["below 1"]),
    "negative epsilon": (GPT2 | {"layer_norm_epsilon": -1}, "layer_norm_epsilon", ["at least 0"]),
    "activation": (LLAMA | {"hidden_act": "relu"}, "hidden_act", ["relu", "silu"]),
    "gpt2 activation": (GPT2 | {"activation_function": "relu"}, "activation_function", ["gelu_new"]),
    "heads": (LLAMA | {"hidden_size": 50, "num_attention_heads": 4}, "hidden_size", ["48 or 52", "= 4"]),
    "gpt2 heads": (GPT2 | {"n_embd": 50, "n_head": 4}, "n_embd", ["48 or 52", "n_head = 4"]),
    "kv heads": (LLAMA | {"num_key_value_heads": 5}, "num_attention_heads", ["num_key_value_heads = 5"]),
    "odd head": (LLAMA | {"head_dim": 5}, "head_dim", ["5", "4 or 6"]),
    "quantized": (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config", ["quantized"]),
    "rope type": (
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling.type",
        ["linear", "default, llama3"],
    ),
    "new rope type": (
        LLAMA | {"rope_parameters": {"rope_type": "yarn"}},
        "rope_parameters.rope_type",
        ["yarn", "default, llama3"],
    ),
    "rope type of qwen2": (QWEN2 | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.type", ["yarn"]),
    "rope type of mistral": (
        MISTRAL | {"rope_parameters": {"rope_type": "yarn"}},
        "rope_parameters.rope_type",
        ["yarn"],
    ),
    "window": (MISTRAL | {"sliding_window": 0}, "sliding_window", ["0", "at least 1"]),
    "layer kinds": (QWEN2 | {"layer_types": "full_attention"}, "layer_types", ["a list of texts"]),
    "rope factor": (
        LLAMA | {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "factor"}},
        "rope_scaling.factor",
        ["missing"],
    ),
    "rope bands": (
        LLAMA | {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
        "rope_scaling.high_freq_factor",
        ["low_freq_factor = 1"],
    ),
    "rope per layer": (
        LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
        "rope_parameters.full_attention",
        ["not built"],
    ),
    "part of the head": (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor", ["0.5", "1.0"]),
    "inverse layer": (
        GPT2 | {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx",
        ["not built"],
    ),
    "upcast": (GPT2 | {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn", ["not built"]),
    "unscaled": (GPT2 | {"scale_attn_weights": False}, "scale_attn_weights", ["scale_attn_weights: true"]),
    "cross attention": (GPT2 | {"add_cross_attention": True}, "add_cross_attention", ["not built"]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named_with_its_file(case):
    content, key, words = BAD[case]
    with pytest.raises(UserError) as raised:
        read(content)
    assert raised.value.key == key
    for word in [*words, str(FILE)]:
        assert word in str(raised.value)


def sizes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    model = Decoder(config, Parallel(Mesh(device="meta", rank=0), residual_layout(True)))
    return {name: spec.shape for name, _, spec in named_specs(model)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("family", "given"),
    [
        (LLAMA, UNLIKE_LLAMA_DEFAULTS),
        (GPT2, UNLIKE_GPT2_DEFAULTS),
        (QWEN2, UNLIKE_NEAR_LLAMA | {"hidden_size": 60}),
        (MISTRAL, UNLIKE_NEAR_LLAMA),
    ],
)
def test_names_and_shapes_are_those_of_transformers(family, given, tied):
    content = family | given | {"tie_word_embeddings": tied}
    theirs = transformers.AutoConfig.for_model(**content)
    with torch.device("meta"):
        expected = sizes_of(transformers.AutoModelForCausalLM.from_config(theirs))
        base = sizes_of(transformers.AutoModel.from_config(theirs))
    if tied:
        del expected["lm_head.weight"]
    config = read(content)
    stored = stored_tensors(config, shapes(config))
    assert {tensor.names[0]: tensor.shape for tensor in stored} == expected
    known = {name: tensor.shape for tensor in stored for name in tensor.names}
    assert base.items() <= known.items()  # a base model saved alone has shorter names


def test_a_parameter_without_a_place_is_named():
    config = read(GPT2 | UNLIKE_GPT2_DEFAULTS)
    with pytest.raises(ValueError, match=r"gpt2 .* head\.bias"):
        stored_tensors(config, shapes(config) | {"head.bias": (509,)})


def test_architectures_are_classes_of_transformers():
    for model_type, family in FAMILIES.items():
        assert getattr(transformers, family.architecture).config_class.model_type == model_type
