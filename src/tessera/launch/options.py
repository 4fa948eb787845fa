"""How a run is to be launched, as the command line says it: on which machines, how often again, by whom."""

import socket
from dataclasses import dataclass
from typing import Literal, get_args

from tessera.core.errors import UserError
from tessera.launch.machines import Place

PORT = 29500
"""Where machine 0 listens unless told otherwise: the port that torchrun and accelerate take."""

Launcher = Literal["tessera", "torchrun", "accelerate"]


def known_launcher(name: str) -> Launcher:
    """`name` as one of the launchers. Raises UserError when it is none."""
    for launcher in get_args(Launcher):
        if name == launcher:
            return launcher
    raise UserError("--launcher", name, "is not a launcher", f"one of {', '.join(get_args(Launcher))}")


@dataclass(frozen=True)
class LaunchOptions:
    """Options that belong together; None where not given. Every method raises UserError for those that do not fit."""

    per_machine: int | None = None
    machines: int | None = None
    machine: int | None = None
    main_address: str | None = None
    main_port: int | None = None
    max_restarts: int = 0
    launcher: Launcher = "tessera"
    take_over: bool = False

    def place(self) -> Place:
        """Which of how many machines this is."""
        machines, rank = self.machines or 1, self.machine
        if machines > 1 and self.main_address is None:
            hint = "add --main-process-ip with the address or host name of machine 0"
            raise UserError("--num-machines", machines, "machine 0 cannot be found without its address", hint)
        if machines > 1 and rank is None:
            hint = f"add --machine-rank, from 0 to {machines - 1}, another on each machine"
            raise UserError("--num-machines", machines, "this machine does not know which of them it is", hint)
        if rank is not None and not 0 <= rank < machines:
            fits = "0" if machines == 1 else f"0 to {machines - 1}"
            reason = f"there {'is 1 machine' if machines == 1 else f'are {machines} machines'} (--num-machines)"
            raise UserError("--machine-rank", rank, reason, f"use {fits}, or more machines")
        if machines == 1:
            return Place()
        address = str(self.main_address)
        try:
            socket.getaddrinfo(address, None)
        except OSError as error:
            hint = "give an address, or a name that every machine resolves"
            raise UserError("--main-process-ip", address, f"cannot be resolved: {error.strerror}", hint) from None
        return Place(machines, rank or 0, address, self.main_port or PORT)

    def asked_for(self, num_processes: int | None) -> tuple[int | None, str]:
        """The processes of the whole run that were asked for, and the option that did."""
        machines = self.machines or 1
        if num_processes is not None and num_processes % machines:
            low = num_processes - num_processes % machines
            fits = f"{low} or {low + machines}" if low else str(machines)
            reason = f"{machines} machines (--num-machines) cannot have equally many"
            raise UserError("--num-processes", num_processes, reason, f"it counts those of all machines: use {fits}")
        if self.per_machine is None:
            return num_processes, "--num-processes"
        total = self.per_machine * machines
        if num_processes not in (None, total):
            reason = f"--num-processes {num_processes} on {machines} machines are {(num_processes or 0) // machines}"
            raise UserError("--nproc-per-node", self.per_machine, reason, "one of the two options is enough")
        return total, "--nproc-per-node" if machines == 1 else "--nproc-per-node × --num-machines"

    def processes_here(self, world: int) -> int:
        """How many of the run's `world` processes belong on this machine."""
        machines = self.machines or 1
        if world % machines:
            counts = [count for count in range(1, world + 1) if world % count == 0]
            reason = f"{world} processes, which the sizes make, cannot be shared out equally"
            raise UserError("--num-machines", machines, reason, f"{' or '.join(map(str, counts))} machines can")
        return world // machines
