"""Variables of the environment that make a run slow, or that other programs have left behind."""

from collections.abc import Callable, Mapping

from tessera.doctor.finding import Finding

_OFF = ("", "0")


def _is_on(value: str) -> bool:
    return value.lower() not in (*_OFF, "off", "false", "n", "no")


# variable → when it matters, what it does, what to write instead
_SLOW: Mapping[str, tuple[Callable[[str], bool], str, str]] = {
    "CUDA_LAUNCH_BLOCKING": (_is_on, "the CPU waits for each kernel", ""),
    "NCCL_P2P_DISABLE": (_is_on, "GPUs exchange through the host's memory, not over NVLink or PCIe directly", ""),
    "NCCL_SHM_DISABLE": (_is_on, "GPUs of one machine exchange through network sockets", ""),
    "NCCL_IB_DISABLE": (_is_on, "machines exchange over sockets, not InfiniBand", ""),
    "NCCL_DEBUG": (lambda value: value.upper() in ("INFO", "TRACE"), "NCCL writes down what it does", "WARN"),
    "TORCH_DISTRIBUTED_DEBUG": (lambda value: value.upper() == "DETAIL", "each collective is checked by others", "OFF"),
    "TORCH_NCCL_BLOCKING_WAIT": (_is_on, "the CPU waits for each collective", ""),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": (_is_on, "each tensor asks the driver for memory", ""),
}
_PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def variable_findings(environment: Mapping[str, str], cores: int, ranks: int) -> list[Finding]:
    """One line for each variable that is to be changed, or one that says there is none."""
    found = []
    for name, (matters, does, instead) in _SLOW.items():
        value = environment.get(name, "")
        if value and matters(value):
            mend = f"{name}={instead}" if instead else f"unset {name}, unless it mends something here"
            found.append(Finding(name, "slow", f"{value}: {does}", mend))
    threads = environment.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) * ranks > cores > 0 and int(threads) > 1:
        text = f"{threads} threads in each of {ranks} ranks, on {cores} cores"
        found.append(Finding("OMP_NUM_THREADS", "slow", text, f"unset it, or {max(1, cores // ranks)}"))
    left = [name for name in _PLACE if environment.get(name)]
    if left:
        text = f"{', '.join(left)} {'is' if len(left) == 1 else 'are'} set: a run would take itself for a rank"
        found.append(Finding("launcher", "wrong", text, f"unset {' '.join(left)}, unless torchrun starts the run"))
    return found or [Finding("variables", "ok", "none that slows a run down is set")]
