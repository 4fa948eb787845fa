"""Runs on every rank of a pool: layouts checked as `tessera verify` does, some with a fault put in."""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from tessera.config.load import make_config
from tessera.core.collectives import Pending, all_gather
from tessera.data.batch import MicroBatch
from tessera.engine.gradients import sum_replicated_gradients
from tessera.layout.parallel import Parallel
from tessera.layout.spec import ParameterSpec
from tessera.models.hub import read_model_config
from tessera.nn.context.cut import cut
from tessera.nn.context.route import ExchangeRoute, exchange_route
from tessera.nn.context.tiles import tiles
from tessera.nn.linear import RowParallelLinear
from tessera.nn.norm import Norm, RMSNorm
from tessera.nn.parameter import named_specs, to_local
from tessera.verify.cases import Case, cases_of, every_case
from tessera.verify.check import Checker, Result
from tessera.verify.report import fault
from tessera.verify.session import Session

LLAMA = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 1000, "n_embd": 96, "n_layer": 6, "n_head": 8, "n_positions": 64}


def save_models(folder: Path) -> dict[str, str]:
    """Folders with config.json alone."""
    for name, content in (("llama", LLAMA), ("gpt2", GPT2)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(content))
    return {name: str(folder / name) for name in ("llama", "gpt2")}


def settings(model: str, **keys: Any) -> dict[str, Any]:
    return {"base_model": model, "datasets": [{"path": "none.txt"}], "micro_batch_size": 4, "bf16": False} | keys


@cache
def checker(device: str = "cpu") -> Checker:
    """One for all tests of a worker, whose meshes and references it keeps."""
    return Checker(torch.device(device))


def case_of(keys: dict[str, Any], layers: int = 2, micro_batches: int = 2, full: bool = False) -> Case:
    config, _ = make_config(keys)
    (case,) = cases_of(config, read_model_config(Path(config.base_model)), full=full)
    return shorter(case, layers, micro_batches)


def shorter(case: Case, layers: int, micro_batches: int) -> Case:
    model = replace(case.problem.model, num_layers=layers)
    return replace(case, problem=replace(case.problem, model=model, micro_batches=micro_batches, steps=1))


def check(keys: dict[str, Any], full: bool = False) -> Result:
    return checker().check(case_of(keys, full=full))


def check_on(device: str, keys: dict[str, Any]) -> Result:
    return checker(device).check(case_of(keys))


def check_every_layout(keys: dict[str, Any], world: int) -> tuple[list[Result], str]:
    """All layouts of a world, with one layer, and what is printed of them."""
    config, _ = make_config(keys)
    cases, unfit = every_case(config, read_model_config(Path(config.base_model)), world, full=False)
    said = io.StringIO()
    results = Session(checker(), Console(file=said, width=100)).several([shorter(case, 1, 2) for case in cases], unfit)
    return results, said.getvalue()


def leave_out_each(keys: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Every collective of a short step, (kind, axis) and whether it was caught."""
    case = case_of(keys, layers=1, micro_batches=1)
    omissions = checker().omissions(case)
    return [(o.kind, o.axis, checker().catches(case, o)) for o in omissions]


def collectives_of(keys: dict[str, Any]) -> list[str]:
    """Every collective of a short step, in words."""
    return list(map(str, checker().omissions(case_of(keys, layers=1, micro_batches=1))))


def leave_out_at_full_size(keys: dict[str, Any]) -> dict[tuple[str, str], Result]:
    """The first collective of each kind on each axis left out of a short step: what is found, by kind and axis."""
    case = case_of(keys, layers=1, micro_batches=1, full=True)
    first = {(o.kind, o.axis): o for o in reversed(checker().omissions(case))}
    return {key: checker().check(case, omission) for key, omission in first.items()}


def diagnoses(keys: dict[str, Any], kinds: tuple[str, ...]) -> list[tuple[str, str, list[str]]]:
    """What is said of every other collective of these kinds when it is left out of a short step."""
    case = case_of(keys, layers=1, micro_batches=1)
    chosen = [o for o in checker().omissions(case) if o.kind in kinds][::2]
    return [(o.kind, o.axis, checker().check(case, o).diagnosis) for o in chosen]


# ---- Faults that other implementations had


@contextmanager
def no_sum_over_depth() -> Iterator[None]:
    """The step forgets it; the formula, which reads the same rule, does not."""
    summed = ParameterSpec.summed_axes.fget
    assert summed is not None
    without = property(lambda s: tuple(a for a in summed(s) if a != "depth"))

    def forgetful(model: torch.nn.Module, mesh: Any) -> None:
        with mock.patch.object(ParameterSpec, "summed_axes", without):
            sum_replicated_gradients(model, mesh)

    with mock.patch("tessera.engine.step.sum_replicated_gradients", forgetful):
        yield


@contextmanager
def bias_on_each_rank() -> Iterator[None]:
    """As if each rank of col added the bias of a row-parallel layer before the sum."""
    once = RowParallelLinear.local_bias

    def on_each(layer: RowParallelLinear) -> torch.Tensor | None:
        bias = once(layer)
        return None if bias is None else layer.parallel.mesh.sizes["col"] * bias

    with mock.patch.object(RowParallelLinear, "local_bias", on_each):
        yield


@contextmanager
def norms_not_summed() -> Iterator[None]:
    def matrices_only(model: torch.nn.Module, mesh: Any) -> None:
        held = {p: to_local(p.grad).clone() for _, p, spec in named_specs(model) if len(spec.shape) == 1}
        sum_replicated_gradients(model, mesh)
        for parameter, gradient in held.items():
            to_local(parameter.grad).copy_(gradient)

    with mock.patch("tessera.engine.step.sum_replicated_gradients", matrices_only):
        yield


@contextmanager
def no_sum_over_col() -> Iterator[None]:
    """The scatter-sum of row-parallel outputs (and of input gradients) along col is never asked for."""
    import tessera.product.gathered

    real = tessera.product.gathered.start_reduce

    def forgetful(x: torch.Tensor, dim: int | None, group: Any) -> Pending:
        if group is None or group.axes != ("col",) or dim is None:
            return real(x, dim, group)
        return Pending(x.chunk(group.size, dim)[group.rank].contiguous())

    with mock.patch("tessera.product.gathered.start_reduce", forgetful):
        yield


@contextmanager
def gathered_for_nothing() -> Iterator[None]:
    """Right numbers, needless traffic."""
    real = RMSNorm.forward

    def wasteful(norm: Norm, x: torch.Tensor) -> torch.Tensor:
        all_gather(x.detach(), 0, norm.parallel.mesh.group(("col",)))
        return real(norm, x)

    with mock.patch.object(RMSNorm, "forward", wasteful):
        yield


def _cut_otherwise(change: Callable[[MicroBatch], MicroBatch], change_after: bool) -> Any:
    """A rank's part of a micro-batch whose sequences ranks share, changed before or after it is taken."""

    def otherwise(batch: MicroBatch, parallel: Parallel, windows: Any) -> MicroBatch:
        if not parallel.cuts_sequences or batch.streams is not None:
            return cut(batch, parallel, windows)
        return change(cut(batch, parallel, windows)) if change_after else cut(change(batch), parallel, windows)

    return mock.patch("tessera.models.decoder.cut", otherwise)


def positions_not_permuted() -> Any:
    """As if a rank's tokens were the first of their sequence."""
    counted = lambda ids: torch.arange(ids.shape[1]).expand_as(ids)  # noqa: E731
    return _cut_otherwise(lambda batch: replace(batch, positions=counted(batch.input_ids)), change_after=True)


def documents_forgotten() -> Any:
    return _cut_otherwise(lambda batch: replace(batch, documents=None), change_after=False)


def a_tile_left_out() -> Any:
    return mock.patch("tessera.nn.context.route.tiles", lambda *given: tiles(*given)[:-1])


def keys_of_the_wrong_owner() -> Any:
    """What arrives lies rank by rank, not as the stream has it."""

    def unordered(*given: Any) -> ExchangeRoute:
        route = exchange_route(*given)
        return replace(route, order=((0, sum(route.received)),))

    return mock.patch("tessera.nn.context.route.exchange_route", unordered)


FAULTS: dict[str, Callable[[], Any]] = {
    f.__name__: f
    for f in (
        no_sum_over_depth,
        bias_on_each_rank,
        norms_not_summed,
        no_sum_over_col,
        gathered_for_nothing,
        positions_not_permuted,
        documents_forgotten,
        a_tile_left_out,
        keys_of_the_wrong_owner,
    )
} | {"none": nullcontext}


def told(keys: dict[str, Any], name: str, full: bool = False) -> str:
    """What is said of a layout with a fault."""
    with FAULTS[name]():
        return fault(check(keys, full))
