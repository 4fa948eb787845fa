"""The links between the devices of a machine, and between machines: what they are, how fast they were, what is slow."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tessera.core.driver import NVLINK, PCIE, Link
from tessera.core.text import counted
from tessera.doctor.finding import Finding, Table
from tessera.doctor.pairs import Measured, Pair

Links = Mapping[tuple[int, int], Link]
"""By two GPUs of a machine as CUDA counts them, the lower first."""
NETWORK, LOOPBACK, IN_A_MACHINE = "network", "loopback", "GPUs of one machine"
FAR_BELOW = 3
"""A pair this many times slower than the middle one of its kind is slow: PCIe with a quarter of its lanes, a 10 Gb/s
cable among those of 100. Noise of a busy machine stays below it."""
LEAST_OF_NVLINK, LEAST_OF_PCIE = 6e9, 3e9
"""Bytes a second below which something is wrong: of each NVLink, the oldest of which carries 20e9, and of PCIe, where
eight lanes of the third generation carry 7e9."""
SHOWN = 16
"""Ranks in the table of pairs."""


@dataclass(frozen=True)
class Way:
    """What lies between two ranks: a kind, and the same in words."""

    kind: str
    words: str


def way(pair: Pair, measured: Measured, links: Links) -> Way:
    """The way between the ranks of a pair."""
    first, second = (measured.ends[rank] for rank in (pair.first, pair.second))
    if first.machine != second.machine:
        return Way(NETWORK, NETWORK)
    if first.gpu is None or second.gpu is None:
        return Way(LOOPBACK, f"{LOOPBACK} of one machine")
    link = links.get((min(first.gpu, second.gpu), max(first.gpu, second.gpu)))
    return Way(IN_A_MACHINE, IN_A_MACHINE) if link is None else Way(link.kind, str(link))


def link_findings(measured: Measured, links: Links) -> list[Finding]:
    """A line for each kind of link, and one for each pair that is slow."""
    by_way: dict[Way, list[Pair]] = {}
    for pair in measured.pairs:
        by_way.setdefault(way(pair, measured, links), []).append(pair)
    found = []
    for kind, pairs in by_way.items():
        rates, latencies = [pair.rate for pair in pairs], [pair.latency for pair in pairs]
        text = f"{counted(len(pairs), 'pair')}, {_range([rate / 1e9 for rate in rates])} GB/s one way"
        text += f", {_range([1e6 * latency for latency in latencies])} µs for the smallest message"
        found.append(Finding(kind.words, "ok", text))
        usual = statistics.median(rates)
        for pair in pairs:
            least = _least(kind, links, pair, measured)
            if len(pairs) > 2 and pair.rate * FAR_BELOW < usual:
                text = f"{pair.rate / 1e9:.2g} GB/s, where pairs of its kind have {usual / 1e9:.2g}"
                found.append(Finding(f"ranks {pair.first} and {pair.second}", "slow", text, _mend(kind)))
            elif pair.rate < least:
                text = (
                    f"{pair.rate / 1e9:.2g} GB/s over {kind.words}, of which {least / 1e9:.0f} are the least to expect"
                )
                found.append(Finding(f"ranks {pair.first} and {pair.second}", "slow", text, _mend(kind)))
    return found


def _least(kind: Way, links: Links, pair: Pair, measured: Measured) -> float:
    if kind.kind == PCIE:
        return LEAST_OF_PCIE
    if kind.kind == NVLINK:
        first, second = measured.ends[pair.first].gpu, measured.ends[pair.second].gpu
        assert first is not None and second is not None
        return LEAST_OF_NVLINK * links[min(first, second), max(first, second)].lanes
    return 0.0


def _mend(kind: Way) -> str:
    return {
        NVLINK: "nvidia-smi nvlink -s, dmesg | grep -i xid, and NCCL_DEBUG=INFO, which says the way that NCCL takes",
        PCIE: "nvidia-smi topo -p2p r: may they exchange directly? else ACS and IOMMU of the firmware, or the slot",
        NETWORK: "ethtool and NCCL_DEBUG=INFO say which interface is used: NCCL_SOCKET_IFNAME, NCCL_IB_HCA, the cable",
    }.get(kind.kind, "look what else computes here (top), and run this again")


def _range(values: Sequence[float]) -> str:
    least, most = f"{min(values):.3g}", f"{max(values):.3g}"
    return least if least == most else f"{least}–{most}"


def topology_findings(links: Links) -> list[Finding]:
    """How the driver says that GPUs are connected, kind by kind."""
    by_word: dict[str, list[tuple[int, int]]] = {}
    for pair, link in links.items():
        by_word.setdefault(str(link), []).append(pair)
    found = []
    for words, pairs in by_word.items():
        named = "" if len(by_word) == 1 else ": " + ", ".join(f"{a}–{b}" for a, b in pairs[:8])
        named += " …" if named and len(pairs) > 8 else ""
        found.append(Finding(words, "ok", f"{counted(len(pairs), 'pair')} of GPUs{named}"))
    if links and all(link.kind == PCIE for link in links.values()):
        mend = "few bytes between them: dp_shard_size before tensor_parallel_size, or tensor_parallel_mode: 2d"
        found.append(Finding("NVLink", "ok", "none: tensor axes wait for PCIe", mend))
    return found


def pair_table(measured: Measured) -> Table:
    """GB/s one way of each pair, a row for each rank."""
    ranks = range(min(SHOWN, len(measured.ends)))
    rates = {(pair.first, pair.second): pair.rate for pair in measured.pairs}
    heading = ["", *(f"rank {rank}" for rank in ranks)]
    rows = [heading]
    for first in ranks:
        cells = (rates.get((min(first, second), max(first, second))) for second in ranks)
        rows.append([f"rank {first}", *("–" if rate is None else f"{rate / 1e9:.3g}" for rate in cells)])
    more = len(measured.ends) - len(ranks)
    return Table("GB/s of each pair" + (f" (and {more} ranks more: --json)" if more else ""), rows)
