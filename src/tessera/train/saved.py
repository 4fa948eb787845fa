"""What the memory savers of a run save on a rank, by formula: lines that it says before its first step."""

from dataclasses import replace

import torch

from tessera.config.schema import TrainConfig
from tessera.core.text import counted, human
from tessera.layout.parallel import Parallel
from tessera.layout.shape import Savers
from tessera.models.anatomy import Attention, Block, anatomy_of
from tessera.models.config import ModelConfig
from tessera.nn.kernels.varlen import takes_varlen
from tessera.plan.memory import kept_by_layers
from tessera.plan.sequences import query_heads_on, traded_kv_heads
from tessera.plan.tiles import mlp_tiles
from tessera.train.settings import step_shape


def saver_lines(config: TrainConfig, model: ModelConfig, parallel: Parallel) -> list[str]:
    """A line for each saver that is on: what this rank keeps or holds with it, and what without. Rows are full."""
    shape = step_shape(config, parallel)
    plain = replace(shape, recompute=False, savers=Savers())
    whole, kept = (kept_by_layers(model, one, parallel) for one in (plain, shape))
    lines = []
    if shape.recompute:
        again = _why_again(config, model, parallel) if shape.savers.attention_once else ""
        lines.append(
            f"gradient_checkpointing: layers keep {human(kept)} for the backward, instead of {human(whole)}{again}"
        )
    if shape.savers.offload:
        key = "activation_offloading" if config.activation_offloading else "gradient_checkpointing: offload"
        where = "" if parallel.mesh.device.type == "cuda" else ", which is the same memory here: nothing is saved"
        lines.append(f"{key}: {human(kept)} of what layers keep for the backward lie in host memory{where}")
    attention, mlp = anatomy_of(model).kinds[0][0]
    if config.tiled_mlp:
        tiles = mlp_tiles(mlp, shape, parallel)
        one, all_of_it = (_wide(mlp, tokens, parallel) for tokens in (max(tiles), sum(tiles)))
        how = f"{counted(len(tiles), 'part')} of at most {counted(max(tiles), 'token')}"
        lines.append(f"tiled_mlp: {how}; between its products an MLP holds {human(one)}, instead of {human(all_of_it)}")
    if parallel.context.chunks > 1 and attention.attention is not None:
        tokens = shape.tokens_on(parallel.mesh, parallel.attention.tokens)
        several, at_once = (
            gathered_bytes(attention.attention, tokens, parallel, n) for n in (parallel.context.chunks, 1)
        )
        lines.append(
            f"ulysses_chunks: {human(several)} of q, k, v and result are gathered at a time, instead of "
            f"{human(at_once)}; the backward gathers them once more"
        )
    return lines


def _why_again(config: TrainConfig, model: ModelConfig, parallel: Parallel) -> str:
    """What is to be said where attention's kernel is none whose result can be kept."""
    if parallel.cuts_sequences:
        return ""
    step_by_step = config.eager or model.attention_dropout > 0
    q = torch.empty(1, 1, 1, model.head_dim, dtype=parallel.compute, device=parallel.mesh.device)
    if step_by_step or not (q.is_cpu or takes_varlen(q)):
        why = "goes step by step" if step_by_step else "keeps no statistics"
        return f"; attention runs again too, as its kernel {why}"
    return ""


def _wide(mlp: Block, tokens: int, parallel: Parallel) -> int:
    """Bytes of what an MLP's first products give for so many tokens, and what the last one reads."""
    mesh = parallel.mesh
    features = (mlp.column.features + mlp.row.features) // mesh.sizes["col"]
    return tokens // mesh.sizes["inner"] * features * parallel.compute.itemsize


def gathered_bytes(attention: Attention, tokens: int, parallel: Parallel, chunks: int) -> int:
    """Bytes of q, k, v and result that are gathered at a time, in so many groups of heads."""
    split = replace(parallel, context=replace(parallel.context, chunks=chunks))
    heads = 2 * query_heads_on(attention, split) + 2 * traded_kv_heads(attention, split)
    return tokens * heads // chunks * attention.head_dim * parallel.compute.itemsize
