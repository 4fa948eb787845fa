"""A rank's part of a micro-batch whose sequences several ranks share: the one permutation of all its vectors.

Each part of the rows is one stream (layout/context.py); the ranks along `owners` own chunks of it, those along
`ulysses` an equal piece of an owner's tokens each. A rank of the sequence axes has its tokens part after part, so that
the streams' layouts cut them further as they cut any micro-batch.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from tessera.data.batch import MicroBatch, Stream
from tessera.data.samples import IGNORED
from tessera.layout.parallel import Parallel
from tessera.nn.context.assign import assign


def cut(batch: MicroBatch, parallel: Parallel, windows: Sequence[tuple[int | None, int]]) -> MicroBatch:
    """The tokens of `batch` that this rank of the sequence axes has; as it is where each rank has whole sequences.

    `windows` names the windows of the model's layers, each with the number of layers that have it: ranks get equal
    work. Raises ValueError where the tokens do not divide by the ranks.
    """
    if not parallel.cuts_sequences or batch.streams is not None:
        return batch
    mesh, rows, joined, pieces = parallel.mesh, parts(parallel), parallel.context.joined, parallel.mesh.sizes["ulysses"]
    made = streams_of(batch.document_starts, batch.input_ids.numel(), parallel, windows)
    length = made[0].bounds[-1]
    taken = []
    for part in range(rows):
        number = 0 if joined else part
        chunks = made[number].owned[_owner(part, parallel)]
        own = torch.cat([torch.arange(number * length + first, number * length + end) for first, end in chunks])
        taken.append(own.chunk(pieces)[mesh.coordinates["ulysses"]])
    index = torch.stack(taken)
    S = batch.input_ids.shape[1]
    targets = batch.targets.reshape(-1)[index]
    return replace(
        batch,
        input_ids=batch.input_ids.reshape(-1)[index],
        targets=targets,
        valid=int((targets != IGNORED).sum()),
        positions=_taken(batch.positions, index, index % S),
        documents=_taken(batch.documents, index, index // S),
        streams=made,
    )


def parts(parallel: Parallel) -> int:
    """The parts into which attention's layout cuts the rows of a micro-batch, or a joined stream's owners on a rank."""
    return parallel.mesh.size(parallel.attention.tokens)


def _owner(part: int, parallel: Parallel) -> int:
    """The owner of a part of what this rank of the sequence axes has.

    Parts are counted as attention's layout cuts them, owners as ranks of their group: along inner these differ.
    """
    place = dict(parallel.mesh.coordinates)
    for axis in reversed(parallel.attention.tokens):
        part, place[axis] = divmod(part, parallel.mesh.sizes[axis])
    owner = 0
    for axis in parallel.owners:
        owner = owner * parallel.mesh.sizes[axis] + place[axis]
    return owner


def streams_of(
    starts: Sequence[int], tokens: int, parallel: Parallel, windows: Sequence[tuple[int | None, int]]
) -> tuple[Stream, ...]:
    """The streams of a micro-batch of so many `tokens`, whose documents begin at `starts`, and who owns what of them.

    `windows` as for `cut`. Raises ValueError where the tokens do not divide by the ranks.
    """
    mesh, streams = parallel.mesh, 1 if parallel.context.joined else parts(parallel)
    owners, pieces = mesh.size(parallel.owners), mesh.sizes["ulysses"]
    if tokens % (streams * owners * pieces):
        raise ValueError(f"{tokens} tokens do not divide by {streams} streams × {owners} owners × {pieces} pieces")
    length = tokens // streams
    begins, kinds = tuple(starts), tuple(windows)
    return tuple(_stream(begins, first, length, owners, kinds) for first in range(0, tokens, length))


def _taken(vector: Tensor | None, index: Tensor, otherwise: Tensor) -> Tensor:
    return otherwise if vector is None else vector.reshape(-1)[index]


@lru_cache(maxsize=8)  # rows that are not packed have the same in every step
def _stream(
    starts: tuple[int, ...], first: int, length: int, owners: int, windows: tuple[tuple[int | None, int], ...]
) -> Stream:
    bounds = (*(start - first for start in starts if first <= start < first + length), length)
    return Stream(bounds, assign(bounds, owners, windows))
