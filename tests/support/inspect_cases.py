"""Runs on every rank of a pool: what it really holds and receives, for a config as the trainer would lay it out."""

from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.tensor import distribute_tensor

from distributed.model_cases import MODELS, batches
from support.mesh import shared_mesh
from tessera.config.load import make_config
from tessera.core.axes import MODEL_AXES
from tessera.core.collectives import Recorder
from tessera.engine.optimizer import build_optimizer
from tessera.engine.step import Step
from tessera.layout.spec import Init, ParameterSpec
from tessera.layout.streams import HIDDEN
from tessera.models.decoder import Decoder
from tessera.nn import attention, mlp
from tessera.nn.initialize import initialize
from tessera.nn.linear import parallel_linear
from tessera.nn.parameter import named_specs, to_local
from tessera.product.moves import cut
from tessera.train.settings import parallel_for

BATCH, LENGTH = 8, 12
BASE = {
    "base_model": "unread",
    "datasets": [{"path": "unread"}],
    "micro_batch_size": BATCH,
    "sequence_len": LENGTH,
    "gradient_accumulation_steps": 2,
}


def config_of(settings: dict[str, Any]) -> Any:
    return make_config(BASE | settings)[0]


def model_on_rank(name: str, settings: dict[str, Any], dtype: torch.dtype | None = None) -> Decoder:
    config = config_of(settings)
    mesh = shared_mesh({axis: size for axis, size in config.axes.items() if size > 1})
    return Decoder(MODELS[name], parallel_for(config, MODELS[name], mesh, dtype=dtype))


def held_and_received(name: str, settings: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """After one step: the shape and the bytes of the data, gradient and optimizer state of each parameter; the bytes
    received in it."""
    model = model_on_rank(name, settings)
    initialize(model, model.parallel.mesh, seed=5)
    optimizer = build_optimizer(model, "adamw_torch_fused", (0.9, 0.95), 1e-8, 0.0)
    step = Step(model, optimizer, max_grad_norm=1.0)
    with Recorder() as recorder:
        step(batches(model.config, 2, size=BATCH, length=LENGTH), 0, 1e-3)
    held = {}
    for full_name, parameter, _ in named_specs(model):
        gradient = torch.zeros_like(to_local(parameter)) if parameter.grad is None else to_local(parameter.grad)
        state = sum(to_local(value).nbytes for value in optimizer.state[parameter].values())
        local = to_local(parameter)
        held[full_name] = (tuple(local.shape), local.nbytes, gradient.nbytes, state)
    return held, sum(record.received for record in recorder.records)


def held_blocks(name: str, settings: dict[str, Any], weight: str) -> list[Any]:
    """The values of `weight`, and its parts of a residual and a hidden stream whose elements are numbered."""
    model = model_on_rank(name, settings)
    initialize(model, model.parallel.mesh, seed=5)
    values = to_local({full: p for full, p, _ in named_specs(model)}[weight])
    up = model.layers["0"].mlp.up
    streams = [
        cut(torch.arange(BATCH * LENGTH * features).view(-1, features), layout.cuts, model.parallel.mesh)
        for layout, features in ((up.input, up.in_features), (up.output, up.out_features))
    ]
    return [values, *streams]


def activations_on_rank(name: str, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What this rank's first layer makes of one micro-batch, by the names of `--activation`, in float64."""
    return activations_of(model_on_rank(name, settings, torch.float64), config_of(settings).micro_batch_size)


def activations_of(model: Decoder, batch: int) -> dict[str, torch.Tensor]:
    """The same of any model: taken from the layer as it runs, on `batch` sequences of random ids."""
    model.initialize(seed=5)
    layer, made = model.layers["0"], {}

    def keep(name: str):
        return lambda module, args: made.__setitem__(name, args[0])

    def keep_products(names: list[str]):
        def run(layers, x, **options):
            products = parallel_linear(layers, x, **options)
            if layers[0] in (layer.attention.q, layer.mlp.into[0]):
                made.update(zip(names, products, strict=True))
            return products

        return run

    hooked = {"residual": layer.attention_norm, "attention": layer.attention.out, "hidden": layer.mlp.down}
    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in hooked.items()]
    ids = torch.randint(0, model.config.vocab_size, (batch, LENGTH), generator=torch.Generator().manual_seed(3))
    with (
        torch.no_grad(),
        patch.object(attention, "parallel_linear", keep_products(["q", "k", "v"])),
        patch.object(mlp, "parallel_linear", keep_products(["up"] if layer.mlp.gate is None else ["gate", "up"])),
    ):
        model.logits(ids)
    for hook in hooks:
        hook.remove()
    return made


def first_held(sizes: dict[str, int], shape: tuple[int, ...], cuts: tuple[tuple[str, ...], ...]) -> int:
    """The flat index of the first element that this rank holds of a tensor, as DTensor cuts it by its placements."""
    mesh = shared_mesh(sizes)
    assert mesh.device_mesh is not None
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    placements = ParameterSpec(shape, cuts, HIDDEN, Init()).placements(mesh.present(MODEL_AXES))
    return int(distribute_tensor(whole, mesh.device_mesh, placements).to_local()[0, 0])
