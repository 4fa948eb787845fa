"""The parameters that one rank uses and holds, in closed form: from a model's config and the sizes of the axes."""

from dataclasses import dataclass

from tessera.layout.parallel import Parallel
from tessera.layout.spec import local_slice
from tessera.models.config import ModelConfig


@dataclass(frozen=True)
class Shape:
    """A parameter [rows, width] as a rank uses it; `holds` is the part of its rows that the rank holds (FSDP2)."""

    rows: int
    width: int
    holds: int

    @property
    def elements(self) -> int:
        """What the rank holds of it."""
        return self.holds * self.width


@dataclass(frozen=True)
class Shapes:
    """The parameters of some layers: matrices, what lies along features of either stream, and of a head.

    Learned positions are among the residual stream's.
    """

    matrices: list[Shape]
    residual: list[Shape]
    hidden: list[Shape]
    heads: list[Shape]

    @property
    def every(self) -> list[Shape]:
        return self.matrices + self.residual + self.hidden + self.heads

    @property
    def elements(self) -> int:
        """Elements that the rank holds."""
        return sum(shape.elements for shape in self.every)


class Parameters:
    """The shapes of a model's parameters on the rank of `parallel.mesh`."""

    def __init__(self, model: ModelConfig, parallel: Parallel) -> None:
        self.model, self.parallel, self.mesh = model, parallel, parallel.mesh
        self.width = model.hidden_size // self.mesh.size(("inner", *parallel.weights_over))
        self.features = model.hidden_size // self.mesh.size(parallel.residual.features)
        vocabulary = local_slice(model.vocab_size, ("col",), self.mesh)
        self.vocabulary = vocabulary.stop - vocabulary.start

    def _shape(self, rows: int, width: int = 1) -> Shape:
        over = self.parallel.fsdp or ()
        longest = -(-rows // self.mesh.size(over))
        return Shape(rows, width, max(0, min(longest, rows - longest * self.mesh.index(over))))

    def layer(self) -> Shapes:
        """One decoder layer: q, k, v, attention out, (gate,) up, down; norms, biases, gains of heads."""
        model, col = self.model, self.mesh.sizes["col"]
        q, kv, f = (
            n // col for n in (model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim, model.ffn_size)
        )
        ups = [f] * (2 if model.gated else 1)
        matrices = [self._shape(n, self.width) for n in (q, kv, kv, *ups)]  # from the residual stream
        matrices += [self._shape(self.width, n) for n in (q, f)]  # into it
        vectors = 2 * (2 if model.norm == "layer" else 1) + model.attention_out_bias + model.mlp_bias
        hidden = ([q, kv, kv] if model.qkv_bias else []) + (ups if model.mlp_bias else [])
        heads = [self._shape(model.head_dim)] * (2 if model.qk_norm else 0)
        return Shapes(matrices, [self._shape(self.features)] * vectors, [self._shape(n) for n in hidden], heads)

    def rest(self) -> Shapes:
        """Embedding, positions, final norm and head."""
        model = self.model
        matrices = [self._shape(self.vocabulary, self.width)] * (1 if model.tied else 2)
        residual = [self._shape(self.features)] * (2 if model.norm == "layer" else 1)
        residual += [] if model.rope else [self._shape(model.max_positions, self.features)]
        return Shapes(matrices, residual, [self._shape(self.vocabulary)] if model.head_bias else [], [])

    def all(self) -> Shapes:
        """The whole model."""
        layer, rest, L = self.layer(), self.rest(), self.model.num_layers
        return Shapes(
            layer.matrices * L + rest.matrices,
            layer.residual * L + rest.residual,
            layer.hidden * L + rest.hidden,
            layer.heads * L + rest.heads,
        )
