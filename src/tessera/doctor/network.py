"""How processes find one another: loopback, names, the ports of a meeting, interfaces and their speed, InfiniBand."""

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tessera.core.files import in_words
from tessera.doctor.finding import Finding, State, read
from tessera.launch.interface import ELSEWHERE, LOOPBACK, VARIABLES, listening, own_address

PATIENCE = 3.0
FAST = 10_000
"""Mb/s of an interface below which even small models wait for it between machines."""


@dataclass(frozen=True)
class Network:
    """What was seen of the network; texts say why something does not go, and are empty where it does.

    `addresses` are those that this machine's own name stands for; `speeds` the interfaces that are up, but for
    loopback, with Mb/s (None: not told); `infiniband` each port's state and rate; `main` the address of machine 0.
    """

    loopback: str
    port: int
    port_taken: str
    host: str
    addresses: tuple[str, ...]
    unknown_name: str
    way_out: str
    no_way_out: str
    speeds: Mapping[str, int | None] = field(default_factory=dict)
    interfaces: tuple[str, ...] = ()
    infiniband: Mapping[str, str] = field(default_factory=dict)
    main: str | None = None

    @property
    def towards(self) -> str:
        """Whom a way out would lead to."""
        return f"machine 0, {self.main}" if self.main else "other machines or the hub"


def seen(port: int, main: str | None = None) -> Network:
    """What this machine's network is, towards machine 0 at `main` where that is known; asks nobody outside it."""
    host = socket.gethostname()
    addresses: tuple[str, ...] = ()
    unknown = ""
    try:
        addresses = tuple(dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(host, None)))
    except OSError as error:
        unknown = str(error.strerror or error)
    way_out, no_way_out = "", ""
    try:
        way_out = own_address(main or ELSEWHERE)
    except OSError as error:
        no_way_out = str(error.strerror or error)
    interfaces = tuple(name for _, name in socket.if_nameindex())
    return Network(
        loopback=_refused(_connect_to_myself),
        port=port,
        port_taken=_refused(lambda: _bind(port)),
        host=host,
        addresses=addresses,
        unknown_name=unknown,
        way_out=way_out,
        no_way_out=no_way_out,
        speeds={name: _speed(name) for name in interfaces if _is_up(name)},
        interfaces=interfaces,
        infiniband=infiniband_ports(),
        main=main,
    )


def _connect_to_myself() -> None:
    with listening(LOOPBACK) as door, socket.create_connection(door.getsockname(), PATIENCE):
        pass


def _bind(port: int) -> None:
    """Take a port without listening at it: nobody outside can reach this process."""
    with socket.socket() as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a run does
        door.bind(("", port))


def _refused(attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except OSError as error:
        return in_words(error)
    return ""


def _is_up(name: str) -> bool:
    return name not in ("lo", "lo0") and (read(f"/sys/class/net/{name}/operstate") or "").strip() == "up"


def _speed(name: str) -> int | None:
    with suppress(ValueError):
        told = int(read(f"/sys/class/net/{name}/speed") or "")
        return told if told > 0 else None
    return None


def infiniband_ports(root: Path = Path("/sys/class/infiniband")) -> dict[str, str]:
    """Each port of InfiniBand or RoCE, e.g. {"mlx5_0/1": "ACTIVE, 200 Gb/sec (4X HDR)"}."""
    found = {}
    for port in sorted(root.glob("*/ports/*")):
        state = (read(port / "state") or "").strip().partition(": ")[2]
        rate = (read(port / "rate") or "").strip()
        found[f"{port.parents[1].name}/{port.name}"] = f"{state or '?'}, {rate or '?'}"
    return found


def network_findings(network: Network, machines: int, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Judge it for a run on so many `machines`."""
    found = []
    if network.loopback:
        text = f"{LOOPBACK} does not answer ({network.loopback}): ranks of one machine do not find one another"
        mend = "ip link set lo up (a container: any --network, none too, has it)"
        found.append(Finding("loopback", "wrong", text, mend))
    else:
        found.append(Finding("loopback", "ok", f"{LOOPBACK} answers"))
    found.append(_name(network, machines))
    port = f"port {network.port}"
    if network.port_taken and machines > 1:
        text = f"machine 0 cannot listen there: {network.port_taken}"
        found.append(Finding(port, "wrong", text, "end what listens there (ss -ltnp), or --main-process-port for all"))
    elif network.port_taken:
        text = f"cannot be had ({network.port_taken}); a run on one machine takes any that is free"
        found.append(Finding(port, "ok", text, "on several machines --main-process-port"))
    else:
        found.append(Finding(port, "ok", "free, where machine 0 of several would listen"))
    if network.no_way_out:
        text = f"no way leads to {network.towards} ({network.no_way_out})"
        mend = "connect it (ip addr, ip route); without one: models and data in folders, one machine"
        needed = machines > 1 and (network.main or not network.speeds)  # a cluster may have no way but to itself
        found.append(Finding("network", "wrong" if needed else "ok", text, mend))
    else:
        found.append(Finding("network", "ok", f"{network.way_out} is this machine's address towards {network.towards}"))
    for variable in VARIABLES:
        chosen = environment.get(variable, "").lstrip("^=").split(",")[0].split(":")[0]
        if chosen and not any(name.startswith(chosen) for name in network.interfaces):
            text = f"{environment[variable]} is no interface here; there are {', '.join(network.interfaces)}"
            found.append(Finding(variable, "wrong", text, f"unset {variable}, or name one of them"))
    for name, speed in network.speeds.items():
        told = "speed not told" if speed is None else f"{speed / 1000:g} Gb/s"
        if machines > 1 and speed is not None and speed < FAST:
            mend = "connect the machines by a faster network, or let only dp_replicate_size and pp lie between them"
            found.append(Finding(name, "slow", f"{told} between machines", mend))
        else:
            found.append(Finding(name, "ok", told))
    for port, told in network.infiniband.items():
        if told.startswith("ACTIVE"):
            found.append(Finding(port, "ok", told))
        else:
            state: State = "slow" if machines > 1 else "ok"
            found.append(Finding(port, state, f"{told}: NCCL does without", "ibstat says why: cable or subnet manager"))
    return found


def _name(network: Network, machines: int) -> Finding:
    if network.unknown_name:
        text = f"{network.host} stands for no address here ({network.unknown_name})"
        mend = f"add a line '{LOOPBACK} {network.host}' to /etc/hosts"
        return Finding("host name", "wrong" if machines > 1 else "ok", text, mend)
    text = f"{network.host} is {', '.join(network.addresses[:3])}"
    if machines > 1 and all(address.startswith("127.") or address == "::1" for address in network.addresses):
        what = f"{text}, where no other machine finds it: Tessera looks up the address that leads to machine 0"
        return Finding("host name", "ok", what)
    return Finding("host name", "ok", text)
