"""Families of models: a row each says how its config.json reads, and where its files keep our parameters.

A new family is a reader (`_llama`, `_gpt2`) and a table of `Module`s in `FAMILIES`; nothing else knows the
names of Hugging Face. Keys that config.json lacks take the defaults of transformers' own config classes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tessera.core.errors import UserError
from tessera.models.config import ModelConfig
from tessera.nn.rope import RopeConfig
from tessera.sizes.numbers import nearest

# ---------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Module:
    """A module of a Hugging Face model and ours that it holds, with those of `kinds` that ours have.

    `{i}` is the layer. Several of ours are joined along their outputs in this order. A `transposed` weight is
    stored [in, out] (GPT-2's Conv1D), while ours are [out, in].
    """

    name: str
    ours: tuple[str, ...]
    transposed: bool = False
    kinds: tuple[str, ...] = ("weight", "bias")


@dataclass(frozen=True)
class Family:
    """`prefix` opens names in the files of a language model; those of its base model alone lack it.

    `aliases` are other names of config.json's keys. `buffers` are the ends of names of tensors that are no
    parameters and that older files hold.
    """

    architecture: str
    prefix: str
    read: Callable[["Keys"], ModelConfig]
    modules: tuple[Module, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint: our parameters `parts` joined along dim 0, then transposed if `transposed`.

    `shape` is as stored. `names` are those it may have in a file; the first is the one to write.
    """

    names: tuple[str, ...]
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool


def stored_tensors(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[StoredTensor]:
    """Where the checkpoint of a model keeps each of its parameters, given their global `shapes` by our names.

    Raises ValueError for a parameter for which the family has no place.
    """
    family = FAMILIES[config.family]
    tensors = []
    for module in family.modules:
        layers = range(config.num_layers) if "{i}" in module.name else [0]
        for i in layers:
            for kind in module.kinds:
                parts = tuple(f"{ours.format(i=i)}.{kind}" for ours in module.ours)
                if parts[0] in shapes:
                    name = f"{module.name.format(i=i)}.{kind}"
                    tensors.append(_stored(family, config, name, parts, shapes, module.transposed))
    homeless = set(shapes) - {part for tensor in tensors for part in tensor.parts}
    if homeless:
        raise ValueError(f"{config.family} checkpoints have no place for {', '.join(sorted(homeless))}")
    return tensors


def _stored(
    family: Family,
    config: ModelConfig,
    name: str,
    parts: tuple[str, ...],
    shapes: Mapping[str, tuple[int, ...]],
    transposed: bool,
) -> StoredTensor:
    shape = (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:])
    # a tied weight may be kept under either of its two names
    tied = (HEAD,) if config.tied and parts == ("embedding.weight",) else ()
    names = tuple(dict.fromkeys((name, name.removeprefix(family.prefix), *tied)))
    transposed = transposed and len(shape) == 2
    return StoredTensor(names, parts, shape[::-1] if transposed else shape, transposed)


# ---------------------------------------------------------------------------------------------- config.json


class Keys:
    """The keys of a config.json, or of a section of it, checked when read. A null counts as absent."""

    def __init__(self, content: Mapping[str, Any], file: Path, section: str = "") -> None:
        self.content = {key: value for key, value in content.items() if value is not None}
        self.file, self.section_name = file, section

    def error(self, key: str, reason: str, hint: str = "") -> UserError:
        return UserError(self.section_name + key, self.content.get(key), f"{self.file}: {reason}", hint)

    def _read(self, key: str, default: Any, wanted: str, fits: Callable[[Any], bool]) -> Any:
        if key not in self.content:
            if default is None:
                raise self.error(key, "the key is missing", f"it is {wanted}")
            return default
        if not fits(self.content[key]):
            raise self.error(key, f"is not {wanted}")
        return self.content[key]

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1. Without a default the key must be given, here and below."""
        return self._read(key, default, "a whole number of at least 1", lambda v: type(v) is int and v > 0)

    def number(self, key: str, default: float | None = None, *, below: float = math.inf) -> float:
        """A number from 0 to under `below`."""
        wanted = "a number of at least 0" + (f" and below {below:g}" if below < math.inf else "")
        return float(self._read(key, default, wanted, lambda v: type(v) in (int, float) and 0 <= v < below))

    def flag(self, key: str, default: bool) -> bool:
        return self._read(key, default, "true or false", lambda v: type(v) is bool)

    def choice(self, key: str, default: str | None, known: Mapping[str, str]) -> str:
        """What `known` gives for the text of `key`."""
        wanted = f"one of those that are built: {', '.join(sorted(known))}"
        return known[self._read(key, default, wanted, lambda v: isinstance(v, str) and v in known)]

    def section(self, key: str) -> "Keys":
        """The keys below `key`; none when it is absent."""
        content = self._read(key, {}, "a section with keys", lambda v: isinstance(v, dict))
        return Keys(content, self.file, f"{self.section_name}{key}.")


def model_config(content: object, file: Path) -> ModelConfig:
    """The `ModelConfig` of a parsed config.json; `file` is named in errors.

    UserError: an unknown model_type, a missing key, a value that does not fit, a feature that is not built.
    """
    if not isinstance(content, dict):
        raise UserError("base_model", file, "is not a JSON object with keys")
    keys = Keys(content, file)
    family = FAMILIES[keys.choice("model_type", None, {name: name for name in FAMILIES})]
    for alias, key in family.aliases.items():
        if alias in keys.content:
            keys.content.setdefault(key, keys.content[alias])
    if "quantization_config" in keys.content:
        raise keys.error(
            "quantization_config", "quantized weights cannot be trained", "name the model before quantization"
        )
    return family.read(keys)


def _check_divides(keys: Keys, key: str, value: int, divisor_key: str, divisor: int) -> None:
    if value % divisor:
        hint = f"{key}: {nearest(value, divisor)}"
        raise UserError(key, value, f"{keys.file}: does not divide by {divisor_key} = {divisor}", hint)


def _rope(keys: Keys, max_positions: int) -> RopeConfig:
    """Rotary settings in either form: `rope_scaling` beside `rope_theta`, or all in `rope_parameters`."""
    rope = keys.section("rope_scaling" if keys.content.get("rope_scaling") else "rope_parameters")
    nested = [key for key, value in rope.content.items() if isinstance(value, dict)]
    if nested:
        raise rope.error(nested[0], "settings of their own for some layers are not built")
    for place in (rope, keys):
        if place.number("partial_rotary_factor", 1.0) != 1.0:
            raise place.error("partial_rotary_factor", "rotating a part of each head is not built", "1.0")
    theta = rope.number("rope_theta", keys.number("rope_theta", 10000.0))
    kind = rope.choice("rope_type" if "rope_type" in rope.content else "type", "default", ROPE_TYPES)
    if kind == "default":
        return RopeConfig(theta)
    original = rope.size("original_max_position_embeddings", max_positions)
    config = RopeConfig(
        theta,
        rope.number("factor"),
        rope.number("low_freq_factor"),
        rope.number("high_freq_factor"),
        keys.size("original_max_position_embeddings", original),
    )
    if config.high_freq_factor <= config.low_freq_factor:
        raise rope.error("high_freq_factor", f"is not above low_freq_factor = {config.low_freq_factor:g}")
    return config


def _llama(keys: Keys) -> ModelConfig:
    hidden_size, num_heads = keys.size("hidden_size", 4096), keys.size("num_attention_heads", 32)
    num_kv_heads = keys.size("num_key_value_heads", num_heads)
    max_positions = keys.size("max_position_embeddings", 2048)
    if "head_dim" not in keys.content:
        _check_divides(keys, "hidden_size", hidden_size, "num_attention_heads", num_heads)
    _check_divides(keys, "num_attention_heads", num_heads, "num_key_value_heads", num_kv_heads)
    head_dim = keys.size("head_dim", hidden_size // num_heads)
    _check_divides(keys, "head_dim", head_dim, "the two halves that rotate", 2)
    attention_bias = keys.flag("attention_bias", False)
    return ModelConfig(
        family="llama",
        vocab_size=keys.size("vocab_size", 32000),
        hidden_size=hidden_size,
        num_layers=keys.size("num_hidden_layers", 32),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_size=keys.size("intermediate_size", 11008),
        max_positions=max_positions,
        norm="rms",
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        activation=keys.choice("hidden_act", "silu", {"silu": "silu"}),
        gated=True,
        rope=_rope(keys, max_positions),
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=keys.flag("mlp_bias", False),
        tied=keys.flag("tie_word_embeddings", False),
        attention_dropout=keys.number("attention_dropout", 0.0, below=1),
        initializer_range=keys.number("initializer_range", 0.02),
    )


def _qwen3(keys: Keys) -> ModelConfig:
    """Llama with a norm of each query and key head; its config class has other defaults."""
    if keys.flag("use_sliding_window", False):
        raise keys.error("use_sliding_window", "attention within a window is not built", "use_sliding_window: false")
    sizes = {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768, "head_dim": 128}
    keys.content = {"num_key_value_heads": 32, **sizes, **keys.content}
    return replace(_llama(keys), family="qwen3", qk_norm=True)


def _gpt2(keys: Keys) -> ModelConfig:
    for key, built in GPT2_SWITCHES.items():
        if keys.flag(key, built) != built:
            raise keys.error(key, "this variant is not built", f"{key}: {str(built).lower()}")
    hidden_size, num_heads = keys.size("n_embd", 768), keys.size("n_head", 12)
    _check_divides(keys, "n_embd", hidden_size, "n_head", num_heads)
    return ModelConfig(
        family="gpt2",
        vocab_size=keys.size("vocab_size", 50257),
        hidden_size=hidden_size,
        num_layers=keys.size("n_layer", 12),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        ffn_size=keys.size("n_inner", 4 * hidden_size),
        max_positions=keys.size("n_positions", 1024),
        norm="layer",
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        activation=keys.choice("activation_function", "gelu_new", GPT2_ACTIVATIONS),
        gated=False,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tied=keys.flag("tie_word_embeddings", True),
        embedding_dropout=keys.number("embd_pdrop", 0.1, below=1),
        attention_dropout=keys.number("attn_pdrop", 0.1, below=1),
        residual_dropout=keys.number("resid_pdrop", 0.1, below=1),
        initializer_range=keys.number("initializer_range", 0.02),
    )


# ---------------------------------------------------------------------------------------------- tables

HEAD = "lm_head.weight"
ROPE_TYPES = {"default": "default", "llama3": "llama3"}
GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
GPT2_SWITCHES = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}

LLAMA_MODULES = (
    Module("model.embed_tokens", ("embedding",)),
    Module("model.layers.{i}.input_layernorm", ("layers.{i}.attention_norm",)),
    Module("model.layers.{i}.self_attn.q_proj", ("layers.{i}.attention.q",)),
    Module("model.layers.{i}.self_attn.k_proj", ("layers.{i}.attention.k",)),
    Module("model.layers.{i}.self_attn.v_proj", ("layers.{i}.attention.v",)),
    Module("model.layers.{i}.self_attn.o_proj", ("layers.{i}.attention.out",)),
    Module("model.layers.{i}.post_attention_layernorm", ("layers.{i}.mlp_norm",)),
    Module("model.layers.{i}.mlp.gate_proj", ("layers.{i}.mlp.gate",)),
    Module("model.layers.{i}.mlp.up_proj", ("layers.{i}.mlp.up",)),
    Module("model.layers.{i}.mlp.down_proj", ("layers.{i}.mlp.down",)),
    Module("model.norm", ("norm",)),
    Module("lm_head", ("head",), kinds=("weight",)),
)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        read=_gpt2,
        modules=(
            Module("transformer.wte", ("embedding",)),
            Module("transformer.wpe", ("positions",)),
            Module("transformer.h.{i}.ln_1", ("layers.{i}.attention_norm",)),
            Module(
                "transformer.h.{i}.attn.c_attn",
                ("layers.{i}.attention.q", "layers.{i}.attention.k", "layers.{i}.attention.v"),
                transposed=True,
            ),
            Module("transformer.h.{i}.attn.c_proj", ("layers.{i}.attention.out",), transposed=True),
            Module("transformer.h.{i}.ln_2", ("layers.{i}.mlp_norm",)),
            Module("transformer.h.{i}.mlp.c_fc", ("layers.{i}.mlp.up",), transposed=True),
            Module("transformer.h.{i}.mlp.c_proj", ("layers.{i}.mlp.down",), transposed=True),
            Module("transformer.ln_f", ("norm",)),
            Module("lm_head", ("head",), kinds=("weight",)),
        ),
        aliases={
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
        buffers=(".attn.bias", ".attn.masked_bias"),
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        prefix="model.",
        read=_llama,
        modules=LLAMA_MODULES,
        buffers=(".rotary_emb.inv_freq",),
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        prefix="model.",
        read=_qwen3,
        modules=(
            *LLAMA_MODULES,
            Module("model.layers.{i}.self_attn.q_norm", ("layers.{i}.attention.q_norm",)),
            Module("model.layers.{i}.self_attn.k_norm", ("layers.{i}.attention.k_norm",)),
        ),
    ),
}
