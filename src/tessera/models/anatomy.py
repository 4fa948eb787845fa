"""What a decoder is made of: its products, norms and attention, of what widths, from which stream to which, by name.

    model    embedding (+ learned positions) → layers → final norm → head and loss
    layer    blocks, each added to the residual stream
    block    norm → column-parallel product → attention or activation → row-parallel product

This is the one table of it. `nn` and `models` build a decoder so, and tests/models/test_anatomy.py holds each of its
parameters against this table; plan, inspect and verify read the table and hold rules alone. A `site` is a place in a
model by name, e.g. "q·k·v": what several modules do together there is one product. Layers share their sites.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from tessera.layout.parallel import Parallel
from tessera.layout.spec import Init, ParameterSpec
from tessera.layout.streams import Layout
from tessera.models.config import LayerKind, ModelConfig

EMBEDDING, HEAD, LOSS = "embedding", "head", "loss"
"""The sites outside of the layers, beside the final norm's; the first two are names of modules too."""


class Parameter(NamedTuple):
    """A parameter: its name (within its layer, e.g. "mlp.up.weight"), the names of its dims, and how it lies on a mesh.

    The spec has no `init`: how a parameter starts is its module's own matter.
    """

    name: str
    dims: tuple[str, ...]
    spec: ParameterSpec


@dataclass(frozen=True)
class Linear:
    """One linear layer of a product: the name of its module, and its features of the hidden stream, called `dim`."""

    name: str
    features: int
    dim: str


@dataclass(frozen=True)
class Product:
    """One matrix product between `width` features of the residual stream and those of `linears` in the hidden one.

    A `column`-parallel one leads from residual to hidden, and its linears read the same input; a row-parallel one leads
    back. `by_heads`: its hidden stream is that of attention. `dims` are the names of a weight's.
    """

    site: str
    column: bool
    width: int
    linears: tuple[Linear, ...]
    bias: bool = False
    by_heads: bool = False
    dims: tuple[str, str] = ("out", "in")

    @property
    def features(self) -> int:
        """Features of the hidden stream, of all linears together."""
        return sum(linear.features for linear in self.linears)

    def hidden(self, parallel: Parallel) -> Layout:
        """The layout of its hidden stream."""
        return parallel.streams.attention if self.by_heads else parallel.streams.hidden

    def parameters(self, parallel: Parallel) -> Iterator[Parameter]:
        """The weight of each linear, followed by its bias."""
        plan = (parallel.column if self.column else parallel.row)(self.hidden(parallel))
        for linear in self.linears:
            shape = (linear.features, self.width) if self.column else (self.width, linear.features)
            weight = _spec(shape, plan.weight_cuts, plan.input, parallel)
            yield Parameter(f"{linear.name}.weight", self.dims, weight)
            if self.bias:
                bias = _spec(shape[:1], plan.bias_cuts, plan.output, parallel)
                yield Parameter(f"{linear.name}.bias", self.dims[:1], bias)


@dataclass(frozen=True)
class Norm:
    """A norm over the `width` features of the residual stream; a `centred` one (LayerNorm) has a bias too."""

    site: str
    name: str
    width: int
    centred: bool

    @property
    def statistics(self) -> int:
        """Numbers that it takes of each token: the squares, and the mean if it is centred."""
        return 2 if self.centred else 1

    def parameters(self, parallel: Parallel) -> Iterator[Parameter]:
        spec = _spec((self.width,), (parallel.residual.features,), parallel.residual, parallel)
        yield Parameter(f"{self.name}.weight", ("h",), spec)
        if self.centred:
            yield Parameter(f"{self.name}.bias", ("h",), spec)


@dataclass(frozen=True)
class Attention:
    """Attention of `heads`, of which runs of equal length read one of `kv_heads`.

    `window`: how many tokens a query sees; None: all. With `rotary` positions queries and keys are rotated. `norms` are
    modules that norm each query and each key head. `dropout`: probabilities are dropped; `eager`: a config asks for the
    kernel that goes step by step.
    """

    site: str
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    rotary: bool
    norms: tuple[str, ...] = ()
    dropout: bool = False
    eager: bool = False

    @property
    def scores(self) -> bool:
        """Whether its kernel goes step by step and holds a score of each pair of a query and a key (nn/attend.py)."""
        return self.dropout or self.eager

    def parameters(self, parallel: Parallel) -> Iterator[Parameter]:
        spec = _spec((self.head_dim,), ((),), parallel.attention, parallel)
        yield from (Parameter(f"{name}.weight", ("D",), spec) for name in self.norms)


@dataclass(frozen=True)
class Block:
    """norm → `column` → attention, or without it an activation → `row`; the result is added to the residual stream,
    with `dropout` before that.
    """

    norm: Norm
    column: Product
    attention: Attention | None
    row: Product
    dropout: bool = False

    @property
    def products(self) -> tuple[Product, Product]:
        return self.column, self.row

    @property
    def sites(self) -> tuple[str, ...]:
        """In the order of the forward."""
        return tuple(part.site for part in (self.norm, self.column, self.attention, self.row) if part)

    def parameters(self, parallel: Parallel) -> Iterator[Parameter]:
        for part in (self.norm, self.column, self.attention, self.row):
            yield from part.parameters(parallel) if part else ()


Layer = tuple[Block, ...]
"""The blocks of one decoder layer, in order."""


@dataclass(frozen=True)
class Anatomy:
    """A whole model: its `layers` in order, and what is outside of them; `positions` is the length of learned ones."""

    positions: int | None
    layers: tuple[Layer, ...]
    norm: Norm
    head: Product
    tied: bool

    @cached_property
    def kinds(self) -> list[tuple[Layer, int]]:
        """Every layer that differs from the others, and how many there are of it: what readers sum over."""
        return list(Counter(self.layers).items())

    @cached_property
    def kind_numbers(self) -> list[int]:
        """Of each layer in order the place of its kind in `kinds`."""
        places = {layer: place for place, (layer, _) in enumerate(self.kinds)}
        return [places[layer] for layer in self.layers]

    @property
    def products(self) -> list[tuple[Product, int]]:
        """The products of every kind of layer, each with the number of such layers."""
        return [(product, count) for layer, count in self.kinds for block in layer for product in block.products]

    def units(self, parallel: Parallel) -> list[tuple[list[Parameter], int]]:
        """The parameters of each kind of layer, with the number of such layers; at last those of no layer, once."""
        layers = [([p for block in layer for p in block.parameters(parallel)], count) for layer, count in self.kinds]
        return [*layers, ([*self._tables(parallel), *self._last(parallel)], 1)]

    def parameters(self, parallel: Parallel) -> Iterator[Parameter]:
        """Every parameter by its full name, e.g. "layers.3.mlp.up.weight", in the order of the model."""
        yield from self._tables(parallel)
        for index, layer in enumerate(self.layers):
            for block in layer:
                for parameter in block.parameters(parallel):
                    yield parameter._replace(name=f"layers.{index}.{parameter.name}")
        yield from self._last(parallel)

    def _tables(self, parallel: Parallel) -> Iterator[Parameter]:
        width, residual = self.norm.width, parallel.residual
        # looked up by one-hot rows of the hidden stream; the weight lies as the head's does
        as_head, ids = parallel.column().weight_cuts, parallel.row().input
        yield Parameter(f"{EMBEDDING}.weight", ("V", "h"), _spec((self.head.features, width), as_head, ids, parallel))
        if self.positions is not None:
            spec = _spec((self.positions, width), ((), residual.features), residual, parallel)
            yield Parameter("positions.weight", ("S", "h"), spec)

    def _last(self, parallel: Parallel) -> Iterator[Parameter]:
        weight, *bias = self.head.parameters(parallel)
        yield from self.norm.parameters(parallel)
        yield from bias if self.tied else [weight, *bias]


@lru_cache(maxsize=64)
def anatomy_of(model: ModelConfig) -> Anatomy:
    """The anatomy of the decoder that `model` describes."""
    kinds = map(model.kind_of, range(model.num_layers))
    logits = (Linear(HEAD, model.vocab_size, "V"),)
    return Anatomy(
        None if model.rope else model.max_positions,
        tuple((_attention_block(model, kind), _mlp_block(model)) for kind in kinds),
        _norm(model, "final norm", "norm"),
        Product(HEAD, True, model.hidden_size, logits, model.head_bias, dims=("V", "h")),
        model.tied,
    )


def _attention_block(model: ModelConfig, kind: LayerKind) -> Block:
    width, query, kv = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    reads = (Linear("attention.q", query, "heads"), Linear("attention.k", kv, "kv"), Linear("attention.v", kv, "kv"))
    out = (Linear("attention.out", query, "heads"),)
    norms = ("attention.q_norm", "attention.k_norm") if model.qk_norm else ()
    heads = (model.num_heads, model.num_kv_heads, model.head_dim)
    return Block(
        _norm(model, "layer norms", "attention_norm"),
        Product("q·k·v", True, width, reads, model.qkv_bias, by_heads=True),
        Attention(
            "attention",
            *heads,
            kind.window,
            model.rope is not None,
            norms,
            model.attention_dropout > 0,
            model.eager_attention,
        ),
        Product("attention out", False, width, out, model.attention_out_bias, by_heads=True),
        model.residual_dropout > 0,
    )


def _mlp_block(model: ModelConfig) -> Block:
    width, f = model.hidden_size, model.ffn_size
    site, names = ("gate·up", ("mlp.gate", "mlp.up")) if model.gated else ("up", ("mlp.up",))
    return Block(
        _norm(model, "layer norms", "mlp_norm"),
        Product(site, True, width, tuple(Linear(name, f, "ffn") for name in names), model.mlp_bias),
        None,
        Product("down", False, width, (Linear("mlp.down", f, "ffn"),), model.mlp_bias),
        model.residual_dropout > 0,
    )


def _norm(model: ModelConfig, site: str, name: str) -> Norm:
    return Norm(site, name, model.hidden_size, centred=model.norm == "layer")


def _spec(
    shape: tuple[int, ...], cuts: tuple[tuple[str, ...], ...], acts_on: Layout, parallel: Parallel
) -> ParameterSpec:
    return ParameterSpec(shape, cuts, acts_on, Init(), parallel.fsdp or (), parallel.served)
