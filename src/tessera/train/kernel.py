"""What a run says of its attention."""

from tessera.layout.parallel import Parallel
from tessera.models.config import ModelConfig
from tessera.nn.kernels.named import kernel_name


def attention_line(model: ModelConfig, parallel: Parallel, sequence: int, *, packed: bool = False) -> str:
    """The kernel of attention on this rank; of a model with windows that of the layers with the shortest.

    `packed`: rows hold several samples.
    """
    mesh = parallel.mesh
    queries = max(1, model.num_heads // mesh.size(parallel.attention.features))
    keys = max(1, min(queries, model.num_kv_heads // mesh.size(parallel.attention.features)))
    keys = keys if queries % keys == 0 else queries
    windows = [kind.window for kind in model.layer_kinds if kind.window is not None]
    name = kernel_name(
        (queries, keys),
        model.head_dim,
        sequence,
        parallel.compute,
        mesh.device,
        dropout=model.attention_dropout,
        window=min(windows, default=None),
        eager=model.eager_attention,
        documents=packed,
    )
    return f"attention: {name}"
