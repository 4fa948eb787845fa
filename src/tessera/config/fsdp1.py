"""FSDP as FSDP1, accelerate and axolotl spell it, in our keys.

| theirs | ours |
|---|---|
| FULL_SHARD, auto_wrap | what FSDP2 does |
| SHARD_GRAD_OP | fsdp_config.reshard_after_forward: false |
| NO_SHARD | dp_shard_size: 1, with dp_replicate_size |
| HYBRID_SHARD, HYBRID_SHARD_ZERO2 | dp_replicate_size, and as the two above |
| offload | fsdp_config.offload_params: true |
| fsdp_config.activation_checkpointing | gradient_checkpointing |
"""

from typing import Any

from tessera.config import compat
from tessera.config.compat import asks_for_nothing
from tessera.config.reader import nearest
from tessera.config.settled import Settled, judged

STRATEGIES = {
    "1": "full_shard",
    "2": "shard_grad_op",
    "3": "no_shard",
    "4": "hybrid_shard",
    "5": "hybrid_shard_zero2",
}  # by accelerate's numbers
WORDS = (*STRATEGIES.values(), "auto_wrap", "offload")


def settle_fsdp(out: Settled) -> None:
    """Take `fsdp`, `fsdp_version` and what fsdp_config has from FSDP1 as keys of ours."""
    fsdp = out.values.pop("fsdp", None)
    for word in _words(fsdp):
        _take(str(word), "fsdp", fsdp, WORDS, out)
    section = out.values.get("fsdp_config")
    if isinstance(section, dict):
        given = {str(key).removeprefix("fsdp_"): value for key, value in section.items()}  # as accelerate writes them
        section = out.values["fsdp_config"] = judged(given, compat.FSDP, "fsdp_config.", out)
        _settle_section(section, out)
    if str(out.values.get("fsdp_version")) == "1":
        out.notes.append("fsdp_version: 1 has no effect: FSDP2 does the same")
        del out.values["fsdp_version"]


def _words(fsdp: object) -> list[Any]:
    """The words of `fsdp: [full_shard, auto_wrap]`, of `fsdp: full_shard auto_wrap`, and none of `fsdp: true`."""
    if asks_for_nothing(fsdp) or fsdp is True:
        return []
    return fsdp if isinstance(fsdp, list) else str(fsdp).split()


def _settle_section(section: dict[str, Any], out: Settled) -> None:
    version = section.pop("version", None)
    if not asks_for_nothing(version):
        out.take("fsdp_version", int(version) if str(version) in "12" else version, "fsdp_config.fsdp_version", version)
    strategy = section.pop("sharding_strategy", None)
    if not asks_for_nothing(strategy):
        word = STRATEGIES.get(str(strategy), str(strategy))
        _take(word, "fsdp_config.sharding_strategy", strategy, tuple(STRATEGIES.values()), out)
    reshard = section.get("reshard_after_forward")
    if isinstance(reshard, str) and reshard.lower() in STRATEGIES.values():  # accelerate's FSDP1
        del section["reshard_after_forward"]
        _take(reshard, "fsdp_config.reshard_after_forward", reshard, tuple(STRATEGIES.values()), out)
    checkpointing = section.pop("activation_checkpointing", None)
    if not asks_for_nothing(checkpointing):
        name = "fsdp_config.activation_checkpointing"
        out.take("gradient_checkpointing", checkpointing, name, checkpointing)
        out.notes.append(f"{name} is called gradient_checkpointing here")
    if str(section.get("auto_wrap_policy")).upper() == "SIZE_BASED_WRAP":
        del section["auto_wrap_policy"]
        why = "the decoder layers are wrapped, whatever their size"
        out.notes.append(f"fsdp_config.auto_wrap_policy: SIZE_BASED_WRAP has no effect: {why}")


def _take(word: str, name: str, asked: object, known: tuple[str, ...], out: Settled) -> None:
    """Set what one word of FSDP1 means; `name: asked` is where it stands."""
    match word.lower():
        case "full_shard" | "auto_wrap":
            return
        case "offload" if "offload" in known:
            out.take("fsdp_config.offload_params", True, name, asked)
        case "shard_grad_op":
            out.take("fsdp_config.reshard_after_forward", False, name, asked)
        case "no_shard":
            replicate(name, asked, out)
        case "hybrid_shard" | "hybrid_shard_zero2" as hybrid:
            if hybrid.endswith("zero2"):
                out.take("fsdp_config.reshard_after_forward", False, name, asked)
            if out.values.get("dp_replicate_size") in (None, 1):
                reason = "asks for replicas of what is cut, and does not say how many"
                out.refuse(name, asked, reason, "write dp_replicate_size: the number of machines")
        case _:
            hint = nearest(word.lower(), known) or f"supported: {', '.join(known)}"
            out.refuse(name, asked, f"{word} is not a way to shard", hint)


def replicate(name: str, asked: object, out: Settled) -> None:
    """Have every data-parallel rank keep all parameters; how many such ranks there are must be given."""
    if out.values.get("dp_replicate_size") is None:
        reason = "asks for whole replicas, and does not say how many"
        out.refuse(name, asked, reason, "write dp_shard_size: 1, and dp_replicate_size: the number of replicas")
    else:
        out.take("dp_shard_size", 1, name, asked)
