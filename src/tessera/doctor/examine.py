"""Everything that `tessera doctor` looks at, in the order of its report; probes here, judged in the files beside it."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from tessera.config.schema import TrainConfig
from tessera.core import device as devices
from tessera.core import driver
from tessera.core.driver import Gpu
from tessera.core.errors import RunFailed, UserError
from tessera.core.mesh import Mesh
from tessera.core.text import counted
from tessera.doctor import clocks, limits, memory, network, storage
from tessera.doctor.checklist import checklist
from tessera.doctor.devices import Torch, cores_here, cpu_findings, gpu_findings, torch_here
from tessera.doctor.finding import Finding, Section, read
from tessera.doctor.layout import Along, Placed, along_axes, axis_findings, axis_table, rank_table
from tessera.doctor.links import Links, link_findings, pair_table, topology_findings
from tessera.doctor.pairs import Measured, measured
from tessera.doctor.variables import variable_findings
from tessera.doctor.versions import required, version_findings
from tessera.launch.machines import Place
from tessera.launch.options import PORT
from tessera.models.anatomy import anatomy_of
from tessera.plan.peak import peak_bytes
from tessera.sizes.bounds import RANKS_SHOWN, at_most
from tessera.train.less_memory import less_memory
from tessera.train.links import best_numbering
from tessera.train.run import model_of
from tessera.train.settings import compute_dtype, fitting_layout, parallel_for, step_shape, update_of

MOST_RANKS = 8
"""Ranks without a GPU that exchange: 28 pairs."""


@dataclass(frozen=True)
class Asked:
    """What to look at: a config, or None; the machines of a run and the ranks of each, as far as they are given;
    `place` says which machine this is, where all of them measure together; `measure`: links by real processes."""

    config: TrainConfig | None = None
    machines: int = 1
    here: int | None = None
    place: Place = Place()
    port: int = PORT
    measure: bool = True


@dataclass(frozen=True)
class Report:
    """What was found, and for programs what was measured."""

    sections: list[Section]
    measured: Measured | None = None
    placed: Placed | None = None
    along: list[Along] = field(default_factory=list)
    links: Links = field(default_factory=dict)

    @property
    def findings(self) -> list[Finding]:
        return [finding for section in self.sections for finding in section.findings]


@dataclass(frozen=True)
class _Machine:
    """What was asked of driver and torch once, for several sections."""

    gpus: list[Gpu]
    usable: list[Gpu]
    served: tuple[int, int] | None
    links: Links
    torch: Torch


def examine(asked: Asked, now: Callable[[], float] = time.time, environment: Mapping[str, str] = os.environ) -> Report:
    """Look at everything. Raises UserError for a config that does not fit, before a process is started."""
    begun, load = clocks.ticks(), os.getloadavg()[0]  # before this command computes itself
    machine = _machine(environment)
    placed = None if asked.config is None else _placed(asked.config, asked, machine)
    ranks = _ranks_here(asked, placed, machine)
    seen = network.seen(asked.port, asked.place.address if asked.place.machines > 1 else None)
    order = environment.get("CUDA_DEVICE_ORDER", "")
    gpus = gpu_findings(machine.gpus, machine.usable, machine.torch, machine.served, order)
    sections = [
        Section("devices", [*cpu_findings(), *gpus]),
        Section("versions", version_findings(machine.torch, machine.gpus, machine.served, required())),
        Section("environment", variable_findings(environment, cores_here(), ranks)),
        Section("network", network.network_findings(seen, asked.machines)),
    ]
    links, found = _links(machine, asked, ranks, placed, loopback=not seen.loopback)
    need = None if placed is None else _need(placed)
    sections += [
        links,
        _memory(machine, need),
        _storage(placed),
        _limits(placed, ranks, seen),
        _clocks(now, begun, load),
    ]
    along: list[Along] = []
    if placed is not None:
        along = along_axes(placed, machine.links, found)
        tables = [axis_table(along), rank_table(placed)] if placed.mesh.world > 1 else []
        told = [*_crowded(placed, machine.torch.gpus, cores_here()), *axis_findings(along, placed, machine.links)]
        sections.append(Section("mesh", told, tables))
        sections.append(Section("what makes steps faster or smaller", checklist(placed)))
    return Report(sections, found, placed, along, machine.links)


def _machine(environment: Mapping[str, str]) -> _Machine:
    every = driver.gpus()
    usable = driver.visible(every, environment.get("CUDA_VISIBLE_DEVICES"))
    numbers = {gpu.index: place for place, gpu in enumerate(usable)}
    links = {}
    for (first, second), link in (driver.links() if len(usable) > 1 else {}).items():
        if first in numbers and second in numbers:
            places = sorted((numbers[first], numbers[second]))
            links[places[0], places[1]] = link
    return _Machine(every, usable, driver.cuda_of_driver() if every else None, links, torch_here())


def _placed(config: TrainConfig, asked: Asked, machine: _Machine) -> Placed:
    """The config on its devices, ranks numbered as a run would. UserError: sizes that do not fit."""
    world = config.world_size
    at_most("processes", world, RANKS_SHOWN, "is the number of ranks, whose neighbours are listed")
    gpus = machine.torch.gpus
    here = asked.here or max(ranks for ranks in range(1, (gpus or world) + 1) if world % ranks == 0)
    model = model_of(config)
    config = fitting_layout(config, model, here)
    device = devices.local_device()
    compute = compute_dtype(config, device)
    alike = here < world and world % here == 0
    order = {"numbering": best_numbering(config, model, here, compute)} if alike else {}
    mesh = Mesh(config.mesh_sizes, device, rank=0, **order)
    return Placed(config, model, parallel_for(config, model, mesh, compute=compute), here)


def _crowded(placed: Placed, gpus: int, cores: int) -> list[Finding]:
    """A finding where a machine has more ranks than GPUs, or without GPUs than cores."""
    here = f"{counted(placed.here, 'rank')} are to run on this machine, which has"
    if 0 < gpus < placed.here:
        mend = f"--nproc-per-node {gpus} on more machines, or smaller sizes"
        return [Finding("GPUs", "wrong", f"{here} {counted(gpus, 'GPU')}", mend)]
    if not gpus and cores < placed.here:
        return [Finding("cores", "slow", f"{here} {counted(cores, 'core')}", f"at most {cores} ranks compute at once")]
    return []


def _ranks_here(asked: Asked, placed: Placed | None, machine: _Machine) -> int:
    """The ranks that a run has on this machine: of the config, or one for each GPU or each core."""
    if placed is not None:
        return placed.here
    return asked.here or machine.torch.gpus or min(cores_here(), MOST_RANKS)


def _links(
    machine: _Machine, asked: Asked, ranks: int, placed: Placed | None, loopback: bool
) -> tuple[Section, Measured | None]:
    """The links by the driver's word, and measured where that is asked for and can be."""
    findings = topology_findings(machine.links)
    if not asked.measure:
        return Section("links", [*findings, Finding("links", "unknown", "not measured (--no-measure)")]), None
    if not loopback:
        text = "not measured: ranks find one another through loopback, which does not answer"
        return Section("links", [*findings, Finding("links", "unknown", text, "see network")]), None
    gpus = machine.torch.gpus
    least = 1 if gpus or asked.place.machines > 1 else 2
    processes = min(asked.here or gpus, gpus) if gpus else min(max(least, ranks), MOST_RANKS)
    if processes * asked.place.machines < 2:
        return Section("links", [*findings, Finding("links", "ok", "one GPU: nothing travels")]), None
    folder = None if placed is None else Path(placed.config.output_dir)
    try:
        found = measured(processes, asked.place, folder)
    except UserError:
        raise
    except (RunFailed, OSError, ValueError) as error:  # the last: a full disk cuts off what a rank says of its end
        text = f"processes could not exchange: {' '.join(str(error).split())[:300]}"
        mend = "NCCL_DEBUG=INFO (GPUs) or TORCH_CPP_LOG_LEVEL=INFO says what they tried; see network"
        return Section("links", [*findings, Finding("links", "wrong", text, mend)]), None
    if found is None:
        return Section("links", [*findings, Finding("links", "ok", "measured: machine 0 says how fast")]), None
    tables = [pair_table(found)] if len(found.ends) > 2 else []
    return Section("links", [*findings, *link_findings(found, machine.links)], tables), found


def _need(placed: Placed) -> memory.Need:
    """What a run takes of memory here, by formula; and the key that lowers it most."""
    config, shape = placed.config, step_shape(placed.config, placed.parallel)
    offload = config.fsdp_config.offload_params
    peak = peak_bytes(placed.model, shape, placed.parallel, offload=offload, update=update_of(config)).total
    on_gpu = placed.mesh.device.type == "cuda"
    lines = less_memory(config, placed.model, placed.parallel.compute, copies=not on_gpu)
    less = "; ".join(" ".join(line.split()) for line in lines[1:2])
    return memory.Need(peak, min(placed.here, placed.mesh.world), on_gpu, less)


def _memory(machine: _Machine, need: memory.Need | None) -> Section:
    host = memory.host_findings(need, several_gpus=machine.torch.gpus > 1)
    return Section("memory", [*host, *memory.gpu_findings(machine.usable, need)])


def _elements(placed: Placed) -> int:
    units = anatomy_of(placed.model).units(placed.parallel)
    return sum(times * prod(parameter.spec.shape) for unit, times in units for parameter in unit)


def _storage(placed: Placed | None) -> Section:
    """The places of a run: a checkpoint (weights and two moments) and the model must fit into output_dir."""
    if placed is None:
        places = [storage.Place("this folder", Path.cwd())]
    else:
        config, output = placed.config, Path(placed.config.output_dir)
        whole = 4 * _elements(placed) * placed.parallel.dtype.itemsize
        places = [storage.Place("output_dir", output, needed=whole)]
        if config.dataset_prepared_path:  # else it lies in output_dir
            prepared = Path(config.dataset_prepared_path)
            places.append(storage.Place("dataset_prepared_path", prepared, needed=100 * 2**20))
    return Section("file systems", storage.storage_findings([*places, *storage.usual_places()]))


def _limits(placed: Placed | None, ranks: int, seen: network.Network) -> Section:
    largest = None if placed is None else 3 * _elements(placed) * placed.parallel.dtype.itemsize // placed.mesh.world
    needs = limits.Needs(
        ranks, largest, rdma=bool(seen.infiniband) and torch.cuda.is_available(), root=limits.is_root()
    )
    return Section("limits (ulimit)", limits.limit_findings(limits.own_limits(), needs))


def _clocks(now: Callable[[], float], begun: clocks.Ticks | None, load: float) -> Section:
    """Last, so that there is some time between the two looks at the ticks."""
    return Section(
        "clocks",
        [
            clocks.wall_clock(now(), clocks.times_of_packages()),
            clocks.timer(),
            clocks.governor(),
            clocks.load(load, cores_here(), read("/proc/pressure/cpu")),
            clocks.stolen(begun, clocks.ticks()),
        ],
    )
