import bisect
from typing import NamedTuple
Chunk = tuple[int, int]
class Tile(NamedTuple):
    q0: int; q1: int; k0: int; k1: int
    causal: bool; behind: int; window: int | None
def tiles(queries, keys, bounds, window=None):
    out, qo = [], 0; cu = list(bounds)
    merged = []; ko = 0
    for c, d in keys:
        if merged and merged[-1][1] == c: merged[-1] = (merged[-1][0], d, merged[-1][2])
        else: merged.append((c, d, ko))
        ko += d - c
    for a, b in queries:
        for lo, hi in zip(cu, cu[1:]):
            s, e = max(a, lo), min(b, hi)
            if s >= e: continue
            for c, d, at in merged:
                x, y = max(c, lo), min(d, s)
                if x < y: out.append(Tile(qo + s - a, qo + e - a, at + x - c, at + y - c, False, s - x, None))
                x, y = max(c, s), min(d, e)
                if x < y: out.append(Tile(qo + x - a, qo + y - a, at + x - c, at + y - c, True, 0, None)); assert (x,y)==(s,e)
        qo += b - a
    return sorted(out, key=lambda t: not t.causal)
