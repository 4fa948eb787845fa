"""Time in collectives, told apart: until the last rank has come a rank is idle, from then on data move.

A rank stands in a collective from b to e. Of the ranks that it needs the last came at A. Then

    idle            min(A, e) - b, where that is above 0
    communication   e - b, less that

Whose arrival counts: of a broadcast the root's, of a message the other end's, of all else every rank's of the group.
Ranks of one machine share a clock. Between machines clocks are compared where all ranks leave one collective together,
the norm's at the end of a step; so times between machines are right to about what leaving it takes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tessera.core.axes import AXES
from tessera.core.collectives import all_gather, largest
from tessera.core.mesh import Group, Mesh
from tessera.monitor.timeline import Waits

NEVER = -float("inf")
Axes = tuple[str, ...]
SETS = 12
"""Sets of axes whose waits are told apart; a step has fewer."""


class Together:
    """What ranks tell one another of a step so that each can tell its idle time. Every rank makes the same calls.

    `machines` has the machine of each rank: those of one share a clock.
    """

    def __init__(self, mesh: Mesh, machines: Sequence[object]) -> None:
        self.mesh, self.machines = mesh, machines

    def split(self, waits: Sequence[Waits]) -> tuple[float, dict[Axes, float]]:
        """This rank's seconds of `waits`: idle ones, and those of communication by axes.

        Costs an all-gather, and an all-reduce for each set of axes among them.

        Where the ranks of a group have not met in as many collectives, or clocks cannot be compared, all of their time
        counts as communication.
        """
        sets: dict[Axes, list[Waits]] = {}
        for one in waits:
            sets.setdefault(one.axes, []).append(one)
        table, ahead = self._table(sets, waits)
        idle, communication = 0.0, dict[Axes, float]()
        for axes in sorted(sets, key=mask_of):
            own = sets[axes]
            spent = 0.0
            for one, came in zip(own, self._came(axes, own, table, ahead), strict=True):
                for begin, end in one.times:
                    late = max(0.0, min(came, end) - begin)
                    idle += late
                    spent += end - begin - late
            communication[axes] = spent
        return idle, communication

    def _table(
        self, sets: Mapping[Axes, list[Waits]], waits: Sequence[Waits]
    ) -> tuple[list[dict[int, Any]], float | None]:
        """For each rank how many collectives and messages of each set it has; how far this machine's clock is behind.

        Clocks are compared by the moment at which ranks have left what they all took part in last; where machines have
        no such moment, that is None.
        """
        world = self.mesh.present(AXES)
        left = [times[-1][1] for one in waits if one.axes == world and (times := one.times)]
        row = [left[-1] if left else math.nan]
        for axes in sorted(sets, key=mask_of)[:SETS]:
            messages = sum(one.peer is not None for one in sets[axes])
            row += [mask_of(axes), len(sets[axes]) - messages, messages]
        row += [0.0] * (1 + 3 * SETS - len(row))
        own = torch.tensor([row], dtype=torch.float64, device=self.mesh.device)
        rows = all_gather(own, 0, self.mesh.group(AXES)).tolist()
        counts = [{int(r[i]): (r[i + 1], r[i + 2]) for i in range(1, len(r), 3) if r[i]} for r in rows]
        if len(set(self.machines)) == 1:
            return counts, 0.0
        if any(math.isnan(r[0]) for r in rows):
            return counts, None
        own_machine, first = self.machines[self.mesh.rank], self.machines[0]
        moments = {at: min(r[0] for r, of in zip(rows, self.machines, strict=True) if of == at) for at in self.machines}
        return counts, moments[first] - moments[own_machine]

    def _came(self, axes: Axes, own: list[Waits], table: list[dict[int, Any]], ahead: float | None) -> list[float]:
        """For each of this rank's collectives along `axes` when the last rank came that it needed, by this clock."""
        counts: list[Any] = [table[rank].get(mask_of(axes)) for rank in self.mesh.members(axes)]
        group = self.mesh.group(axes)
        together = [one for one in own if one.peer is None]
        messages = [one for one in own if one.peer is not None]
        came = {id(one): NEVER for one in own}
        if group is None or None in counts or ahead is None:
            return list(came.values())
        if together and len({count[0] for count in counts}) == 1:
            arrivals = [
                one.arrival + ahead if one.waited_for and one.arrival is not None else NEVER for one in together
            ]
            last = largest(torch.tensor(arrivals, dtype=torch.float64, device=self.mesh.device), group).tolist()
            came |= {id(one): at - ahead for one, at in zip(together, last, strict=True)}
        if most := int(max(count[1] for count in counts)):
            came |= self._answered(messages, group, most, ahead)
        return [came[id(one)] for one in own]

    def _answered(self, messages: list[Waits], group: Group, most: int, ahead: float) -> dict[int, float]:
        """The same of messages between two ranks: the k-th from a to b is received by b's k-th from a."""
        rows = [[one.peer, one.kind == "receive", (one.arrival or 0.0) + ahead] for one in messages]
        rows += [[-1, 0, NEVER]] * (most - len(rows))
        told = all_gather(torch.tensor(rows, dtype=torch.float64, device=self.mesh.device), 0, group).tolist()
        theirs: dict[tuple[int, bool], list[float]] = {}
        for place, (peer, receives, arrival) in enumerate(told):
            if peer == group.rank:
                theirs.setdefault((place // most, bool(receives)), []).append(arrival)
        answers = {key: iter(arrivals) for key, arrivals in theirs.items()}
        ends = {id(one): answers.get((one.peer or 0, one.kind != "receive"), iter(())) for one in messages}
        return {key: next(end, NEVER) - ahead for key, end in ends.items()}


def mask_of(axes: Axes) -> int:
    """A set of axes as a number."""
    return sum(1 << AXES.index(axis) for axis in axes)
