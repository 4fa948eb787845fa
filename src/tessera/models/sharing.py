"""What sequence axes meet in a model: the heads of a rank, and the rows that its ranks share."""

import math
from collections.abc import Mapping

from tessera.layout.streams import HIDDEN_BY_HEADS, attention_layout, joins_rows
from tessera.models.config import ModelConfig
from tessera.nn.context.heads import kv_heads_of
from tessera.sizes.context import Surroundings, query_heads


def surroundings(model: ModelConfig, axes: Mapping[str, int], batch: int, inside: int | None = None) -> Surroundings:
    """Of micro-batches of `batch` rows beside the tensor `axes`; a machine has `inside` ranks, None: all of them."""
    layout, joined = attention_layout(axes, batch, model.dimensions), joins_rows(axes, batch, model.dimensions)
    heads = query_heads(model.num_heads, axes, layout == HIDDEN_BY_HEADS)
    parts = math.prod(axes[axis] for axis in layout.tokens)
    return Surroundings(
        heads,
        len(kv_heads_of(range(heads), model.num_heads, model.num_kv_heads)),
        model.head_dim,
        None if inside is None else max(1, inside // math.prod(axes.values())),
        rows=batch if joined else batch // parts,
        joined=parts if joined else 1,
    )
