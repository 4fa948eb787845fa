"""Optimizers of libraries that know no layouts, run on this rank's shards: of updates that each element makes alone.

What a checkpoint holds of them is float32 moments, shaped as the parameters, whatever the library keeps: any layout
reads them, and AdamW of one library goes on with what AdamW of another has left.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tessera.engine.quantised import Quantised
from tessera.nn.parameter import to_local

Parameters = list[nn.Parameter]


def like(local: Tensor, parameter: Tensor) -> Tensor:
    """`local`, shaped as this rank's shard of `parameter`, as a DTensor where that is one."""
    return DTensor(local, parameter._spec, requires_grad=False) if isinstance(parameter, DTensor) else local


class OnShards(torch.optim.Optimizer):
    """The optimizer that `make` builds, on the shards of `parameters`; its learning rate is set step by step."""

    def __init__(self, parameters: Parameters, make: Callable[[Parameters], torch.optim.Optimizer]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.shards = {p: nn.Parameter(to_local(p)) for group in self.param_groups for p in group["params"]}
        held = [shard for shard in self.shards.values() if shard.numel()]  # an uneven cut leaves some ranks nothing
        self.inner = make(held) if held else None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if self.inner is None:
            return
        for parameter, shard in self.shards.items():
            shard.data = to_local(parameter)  # FSDP2 gives uneven shards other memory at the first forward
            shard.grad = None if parameter.grad is None else to_local(parameter.grad).contiguous()
        rate = self.param_groups[0]["lr"]
        for group in self.inner.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._update(self.inner)
        for shard in self.shards.values():
            shard.grad = None

    def _update(self, inner: torch.optim.Optimizer) -> None:
        inner.step()

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What a checkpoint holds of `parameter`: new tensors, shaped as it, or counts; zeros before the first step."""
        shard = self.shards[parameter]
        found = self._moments(shard)
        return {key: like(value, parameter) if value.shape == shard.shape else value for key, value in found.items()}

    def take(self, parameter: nn.Parameter, moments: Mapping[str, Tensor]) -> None:
        """Go on from what `moments` has given."""
        shard = self.shards[parameter]
        if shard.numel():
            self._take(shard, {key: to_local(value) for key, value in moments.items()})

    def _moments(self, shard: nn.Parameter) -> dict[str, Tensor]:
        raise NotImplementedError

    def _take(self, shard: nn.Parameter, moments: Mapping[str, Tensor]) -> None:
        raise NotImplementedError

    def _state(self, shard: nn.Parameter) -> dict[str, Any]:
        assert self.inner is not None
        return self.inner.state[shard]


class SGD(OnShards):
    """torch's SGD."""

    def __init__(self, parameters: Parameters, weight_decay: float, options: Mapping[str, Any]) -> None:
        self.momentum = options.get("momentum", 0.0)
        super().__init__(parameters, lambda held: torch.optim.SGD(held, lr=0.0, weight_decay=weight_decay, **options))

    def _moments(self, shard: nn.Parameter) -> dict[str, Tensor]:
        if not self.momentum:
            return {}
        held = self._state(shard).get("momentum_buffer") if shard.numel() else None
        return {"momentum_buffer": torch.zeros_like(shard.detach()) if held is None else held.clone()}

    def _take(self, shard: nn.Parameter, moments: Mapping[str, Tensor]) -> None:
        if self.momentum:
            self._state(shard)["momentum_buffer"] = moments["momentum_buffer"].clone()


class LowBitAdamW(OnShards):
    """AdamW whose moments lie in few bits, a scale for each block of a shard; small shards' lie in full.

    Blocks follow the shards: another layout quantises a checkpoint's moments anew, the same one goes on exactly.
    """

    def _moments(self, shard: nn.Parameter) -> dict[str, Tensor]:
        if not shard.numel():
            empty = torch.zeros(shard.shape, dtype=torch.float32, device=shard.device)
            zero = torch.zeros((), dtype=torch.float32, device=shard.device)
            return {"step": zero, "exp_avg": empty, "exp_avg_sq": empty.clone()}
        state = self._begun(shard)
        held = {key: self._held(state, key) for key in ("exp_avg", "exp_avg_sq")}
        values = {k: v.values() if isinstance(v, Quantised) else v.clone() for k, v in held.items()}
        step = torch.as_tensor(float(state["step"]), dtype=torch.float32, device=shard.device)
        return {"step": step, **{key: value.view(shard.shape).float() for key, value in values.items()}}

    def _take(self, shard: nn.Parameter, moments: Mapping[str, Tensor]) -> None:
        state = self._begun(shard)
        for key in ("exp_avg", "exp_avg_sq"):
            held = self._held(state, key)
            if isinstance(held, Quantised):
                held.take(moments[key])
            else:
                held.copy_(moments[key])
        step = moments["step"].item()
        state["step"] = torch.tensor(step) if isinstance(state["step"], Tensor) else int(step)

    def _begun(self, shard: nn.Parameter) -> dict[str, Any]:
        """The library's state of a shard, begun where there is none yet."""
        raise NotImplementedError

    def _held(self, state: dict[str, Any], key: str) -> Tensor | Quantised:
        raise NotImplementedError


class Torchao(LowBitAdamW):
    """torchao's AdamW8bit and AdamW4bit."""

    def _update(self, inner: torch.optim.Optimizer) -> None:
        on_cpu = next(iter(self.shards.values())).device.type == "cpu"
        # torchao compiles its update, which a CPU need not have a compiler for
        with torch.compiler.set_stance("force_eager" if on_cpu else "default"):
            inner.step()

    def _begun(self, shard: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self._state(shard)
        if not state:
            inner: Any = self.inner
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = (
                inner._new_buffer(shard.detach(), signed) for signed in (True, False)
            )
        return state

    def _held(self, state: dict[str, Any], key: str) -> Tensor | Quantised:
        held = state[key]
        if not hasattr(held, "codes"):
            return held
        return Quantised(held.codes, held.scale, held.qmap, held.block_size, packed=held.qmap.numel() == 16)


class Bitsandbytes(LowBitAdamW):
    """bitsandbytes' AdamW in 8 bits, or in 32 bits that a GPU may page out to host memory."""

    NAMES = {"exp_avg": 1, "exp_avg_sq": 2}
    BLOCK = 256

    def _begun(self, shard: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self._state(shard)
        if not state:
            inner: Any = self.inner
            place = next(i for i, p in enumerate(inner.param_groups[0]["params"]) if p is shard)
            inner.init_state(inner.param_groups[0], shard, 0, place)
        return state

    def _held(self, state: dict[str, Any], key: str) -> Tensor | Quantised:
        number = self.NAMES[key]
        codes = state[f"state{number}"]
        if codes.dtype != torch.uint8:
            return codes
        return Quantised(codes, state[f"absmax{number}"], state[f"qmap{number}"], self.BLOCK)
