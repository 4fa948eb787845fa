"""The optimizers by the names of transformers, all on shards; what needs another package imports it only then."""

import importlib.util
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tessera.core.errors import UserError
from tessera.engine.adamw import AdamW as AdamW
from tessera.engine.muon import Muon
from tessera.engine.on_shards import SGD, Bitsandbytes, OnShards, Parameters, Torchao
from tessera.nn.parameter import named_specs

TORCHAO = {"adamw_torch_8bit": 8, "ao_adamw_8bit": 8, "adamw_torch_4bit": 4, "ao_adamw_4bit": 4}
BITSANDBYTES = {"adamw_bnb_8bit": 8, "adamw_8bit": 8, "paged_adamw_8bit": 8, "paged_adamw_32bit": 32}
"""The bits of an element of each moment."""
EXACT = ("adamw_torch_fused", "adamw_torch")
"""Those whose update is the same in every layout but for rounding."""
NAMES = (*EXACT, "sgd", "muon", *TORCHAO, *BITSANDBYTES)
OPTIONS: dict[str, dict[str, tuple[type, ...]]] = {
    "sgd": {"momentum": (int, float), "dampening": (int, float), "nesterov": (bool,)},
    "muon": {
        "momentum": (int, float),
        "nesterov": (bool,),
        "ns_coefficients": (list, tuple),
        "ns_steps": (int,),
        "eps": (int, float),
        "adjust_lr_fn": (str,),
    },
    **{name: {"block_size": (int,)} for name in TORCHAO},
    **{name: {"min_8bit_size": (int,)} for name in BITSANDBYTES},
}
"""What each optimizer takes beside the keys of its own, and of what type."""

Optimizer = AdamW | OnShards | Muon


def missing_package(name: str) -> str:
    """The package that the optimizer `name` needs and that is not installed; empty where there is none."""
    package = "torchao" if name in TORCHAO else "bitsandbytes" if name in BITSANDBYTES else ""
    return package if package and importlib.util.find_spec(package) is None else ""


def refuse_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise UserError, with those it knows, for options that the optimizer `name` does not take."""
    try:
        check_options(name, options)
    except ValueError as error:
        known = ", ".join(OPTIONS.get(name, {}))
        hint = f"options of {name}: {known}" if known else "leave optim_args out"
        raise UserError("optim_args", options, str(error), hint) from error


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for options that the optimizer `name` does not take."""
    known = OPTIONS.get(name, {})
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"{name} has no option {key}")
        if not isinstance(value, known[key]) or isinstance(value, bool) != (known[key] == (bool,)):
            raise ValueError(f"{key}: {value} is not of type {known[key][-1].__name__}")
    block = options.get("block_size", 2)
    if block < 2 or block % 2:  # two elements of 4 bits lie in a byte
        raise ValueError(f"block_size: {block} is no even number from 2 on")
    try:
        nothing = nn.Parameter(torch.zeros(1, 1))
        nothing.grad = torch.ones(1, 1)
        if name == "sgd":
            torch.optim.SGD([nothing], lr=0.0, **options).step()
        elif name == "muon":
            torch.optim.Muon([nothing], lr=0.0, **options).step()  # some options are looked at in a step alone
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise ValueError(str(error)) from error


def build_optimizer(
    model: nn.Module,
    name: str,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    options: Mapping[str, Any] | None = None,
) -> Optimizer:
    """The optimizer `name` over every parameter that is trained, weight decay included, as in torch.optim.

    The learning rate is 0 until each step sets it.
    """
    options = dict(options or {})
    named = [one for one in named_specs(model) if one[1].requires_grad]
    parameters = [parameter for _, parameter, _ in named]
    if name in EXACT:
        fused = name == "adamw_torch_fused"
        return AdamW(
            parameters, lr=0.0, betas=betas, eps=epsilon, weight_decay=weight_decay, fused=fused, foreach=not fused
        )
    if name == "sgd":
        return SGD(parameters, weight_decay, options)
    adamw = {"betas": betas, "eps": epsilon}
    if name == "muon":
        return Muon(named, model.parallel.mesh, adamw, weight_decay, options)  # type: ignore[arg-type,union-attr]
    settings = {"lr": 0.0, **adamw, "weight_decay": weight_decay, **options}
    return _of_torchao(name, parameters, settings) if name in TORCHAO else _of_bitsandbytes(name, parameters, settings)


def _of_torchao(name: str, parameters: Parameters, settings: dict[str, Any]) -> Torchao:
    with _quietly():
        import torchao.optim as ao
    made = ao.AdamW8bit if TORCHAO[name] == 8 else ao.AdamW4bit
    return Torchao(parameters, lambda held: made(held, **settings))


def _of_bitsandbytes(name: str, parameters: Parameters, settings: dict[str, Any]) -> Bitsandbytes:
    with _quietly():
        import bitsandbytes.optim as bnb
    # only a GPU's memory is paged; that changes no number
    paged = name.startswith("paged") and parameters[0].device.type == "cuda"
    bits = BITSANDBYTES[name]
    return Bitsandbytes(parameters, lambda held: bnb.AdamW(held, optim_bits=bits, is_paged=paged, **settings))


class _quietly:
    """Without warnings of a package, while it is imported, about kernels of its own that are for other machines."""

    def __enter__(self) -> None:
        logging.disable(logging.WARNING)

    def __exit__(self, *error: object) -> None:
        logging.disable(logging.NOTSET)
