"""In which order the ranks of a machine take its devices, where the links between these differ.

Where some devices are joined faster than others, by bridges between two cards or on one of two sockets, ranks along
the axis that moves most should be joined so. E.g. with bridges 0–2 and 1–3, and shard 2 × col 2:

    col moves most      devices 0, 2, 1, 3: the two ranks of a group along col have a bridge
    shard moves most    devices 0, 1, 2, 3: those along shard have it

A group's collectives run around the ring of its ranks, at the rate of its slowest link. The best order is that whose
slowest link along the busiest axis is the fastest, of those that whose link along the next axis is, and so on; of
equal ones the first, which is the usual order where it is among them. Pairs of ranks were measured by
`tessera measure`, as `Profile.pairs` has them.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.core.arrays import larger, smaller
from tessera.core.axes import AXES
from tessera.plan.traffic import Transfer

Pairs = tuple[tuple[int, int, float], ...]
DIFFER = 1.5
"""Links are of different kinds where one is so many times as fast as the next; pairs of one kind differ by less."""
COMPARED = 8
"""Devices of which every order is compared, 40,320 at most; of more they are grouped, by the fastest links first."""


@lru_cache(maxsize=64)
def link_rates(pairs: Pairs, devices: int) -> NDArray[np.float64] | None:
    """Bytes/s between the first `devices` ranks, [devices, devices]; of a kind of link the slowest counts for all.

    None where links do not differ, or where some pair was not measured.
    """
    known = {(first, second): rate for first, second, rate in pairs if max(first, second) < devices}
    if devices < 2 or len(known) != devices * (devices - 1) // 2:
        return None
    kinds: list[list[float]] = []
    for rate in sorted(known.values()):
        if kinds and rate < DIFFER * kinds[-1][-1]:
            kinds[-1].append(rate)
        else:
            kinds.append([rate])
    if len(kinds) == 1:
        return None
    slowest = {rate: kind[0] for kind in kinds for rate in kind}
    rates = np.full((devices, devices), np.inf)
    for (first, second), rate in known.items():
        rates[first, second] = rates[second, first] = slowest[rate]
    return rates


def sizes_inside(sizes: Mapping[str, Any], here: int, numbering: Sequence[str] = AXES) -> dict[str, Any]:
    """Of each axis the ranks that follow one another on a machine of `here`; numbers, or arrays of candidates."""
    inside, stride = {}, 1
    for axis in reversed(numbering):
        inside[axis] = smaller(sizes.get(axis, 1), larger(1, here // stride))
        stride = stride * sizes.get(axis, 1)
    return {axis: inside[axis] for axis in numbering}


def received_along(transfers: Iterable[Transfer]) -> dict[str, Any]:
    """Bytes that a rank receives in a step along each axis, those of a group along several axes for each of them."""
    received = dict[str, Any].fromkeys(AXES, 0)
    for each in transfers:
        for axis in each.axes:
            received[axis] = received[axis] + each.times * each.received
    return received


def busiest_first(inside: Mapping[str, Any], received: Mapping[str, Any]) -> NDArray[np.int64]:
    """The places of the axes of `inside`, [..., axes], those along which most is received first, then inner ones.

    Axes of one rank come last.
    """
    axes = list(inside)
    amounts = np.broadcast_arrays(*(np.where(inside[axis] > 1, received[axis], -1) for axis in reversed(axes)))
    return len(axes) - 1 - np.argsort(-np.stack(amounts, axis=-1), axis=-1, kind="stable")


@lru_cache(maxsize=4096)
def device_order(pairs: Pairs, inside: tuple[int, ...], busiest: tuple[int, ...]) -> tuple[int, ...]:
    """Of each rank of a machine the device that it takes.

    `inside`: the sizes of the axes there, outermost first; `busiest`: their places, that of the busiest axis first.
    """
    devices = prod(inside)
    usual, rates = tuple(range(devices)), link_rates(pairs, devices)
    if rates is None:
        return usual
    if devices <= COMPARED:
        orders = np.array(list(itertools.permutations(usual)))
    else:
        orders = np.array([usual, _grouped(rates, inside, busiest)])
    scores = [-_slowest(rates, orders, inside, [place]) for place in reversed(busiest)]
    best = np.lexsort((np.arange(len(orders)), *scores))[0]  # the last key is the first to count
    return tuple(map(int, orders[best]))


def _slowest(
    rates: NDArray[np.float64], orders: NDArray[Any], inside: tuple[int, ...], axes: Sequence[int]
) -> NDArray[np.float64]:
    """Of each of `orders` [n, devices] the slowest link of all rings along `axes`, places in `inside`."""
    ranks = np.moveaxis(np.arange(prod(inside)).reshape(inside), axes, range(-len(axes), 0))
    groups = ranks.reshape(-1, prod(inside[axis] for axis in axes))
    if groups.shape[1] == 1:
        return np.full(len(orders), np.inf)
    following = np.roll(groups, -1, axis=1)
    return np.asarray(rates[orders[:, groups.ravel()], orders[:, following.ravel()]].min(axis=1))


def _grouped(rates: NDArray[np.float64], inside: tuple[int, ...], busiest: tuple[int, ...]) -> tuple[int, ...]:
    """The devices put together along the busiest axis, then these groups along the next, each with the nearest."""
    units: list[tuple[int, ...]] = [(device,) for device in range(len(rates))]
    for place in busiest:
        rest, units = units, []
        while rest:
            group = [rest.pop(0)]
            while len(group) < inside[place]:
                group.append(rest.pop(int(np.argmax([_joined(rates, group[-1], unit) for unit in rest]))))
            units.append(tuple(itertools.chain.from_iterable(group)))
    nested = np.array(units[0]).reshape([inside[place] for place in reversed(busiest)])
    return tuple(map(int, nested.transpose(np.argsort(busiest[::-1])).ravel()))


def _joined(rates: NDArray[np.float64], unit: tuple[int, ...], other: tuple[int, ...]) -> float:
    return min(float(rates[pair]) for pair in zip(unit, other, strict=True))


def slowest_link(pairs: Pairs, order: tuple[int, ...], inside: tuple[int, ...], axis: int) -> float:
    """Bytes/s of the slowest link along an axis, by its place in `inside`; infinite where nothing moves or differs."""
    rates = link_rates(pairs, len(order))
    return np.inf if rates is None else float(_slowest(rates, np.array([order]), inside, [axis])[0])


class Links:
    """The links that collectives of a mesh, or of many, meet on a machine, beside those that were measured.

    Collectives were measured along neighbouring devices. Where links differ, a group on others, under the best order,
    is faster or slower by the share that `share` says. `inside`: as `sizes_inside` has it, numbers or arrays;
    `received`: as `received_along`.
    """

    def __init__(self, pairs: Pairs, inside: Mapping[str, Any], received: Mapping[str, Any]) -> None:
        self.pairs = pairs
        sizes = np.stack(np.broadcast_arrays(*(inside[axis] for axis in AXES)), axis=-1)
        sizes, order = np.broadcast_arrays(sizes, busiest_first({axis: inside[axis] for axis in AXES}, received))
        self.shape = sizes.shape[:-1]
        every = np.concatenate([sizes, order], axis=-1).reshape(-1, 2 * len(AXES))
        self.meshes, which = np.unique(every, axis=0, return_inverse=True)
        self.which = which.reshape(-1)

    def share(self, axes: Iterable[str]) -> Any:
        """The slowest link of a group along `axes` over that of as many neighbours; 1 where links do not differ."""
        places = tuple(place for place, axis in enumerate(AXES) if axis in set(axes))
        shares = np.array([_share(self.pairs, tuple(map(int, mesh)), places) for mesh in self.meshes])
        found = shares[self.which].reshape(self.shape)
        return found if self.shape else float(found)


@lru_cache(maxsize=4096)
def _share(pairs: Pairs, mesh: tuple[int, ...], axes: tuple[int, ...]) -> float:
    inside, busiest = mesh[: len(AXES)], mesh[len(AXES) :]
    devices, size = prod(inside), prod(inside[axis] for axis in axes)
    rates = link_rates(pairs, devices)
    if rates is None or size == 1:
        return 1.0
    own = _slowest(rates, np.array([device_order(pairs, inside, busiest)]), inside, axes)[0]
    neighbours = _slowest(rates, np.arange(devices)[None], (devices // size, size), [1])[0]
    return float(own / neighbours)
