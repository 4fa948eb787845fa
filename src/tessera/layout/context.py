"""Context parallelism: how the tokens of a sequence lie over ranks.

The rows of a micro-batch fall into parts, as attention's layout cuts them; each part is one packed stream of tokens.
The ranks along `owners` own the tokens of a stream, equally many each (nn/context/assign.py says which); along
`ulysses` each owner's tokens are cut once more, and attention trades heads for tokens there.

    axis         cuts                           what attention moves along it
    ring         a stream, by owner             keys and values, to where tiles read them
    ulysses      an owner's tokens              heads against tokens: q, k, v, and the result on its way back
    depth · row  the stream too, if `joined`    as along ring; else each rank has streams of its own
    inner        as depth · row, where attention's heads are not cut along it
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Context:
    """How keys and values reach the ranks whose queries read them.

    `transport`: `exchange` sends each rank what its tiles read, at once; `ring` passes it from neighbour to neighbour,
    while tiles are computed. `chunks`: heads are traded for tokens in so many groups one after another. `joined`: the
    axes that cut attention's tokens own parts of one stream together, for a micro-batch has too few rows for them.
    """

    transport: str = "exchange"
    chunks: int = 1
    joined: bool = False
