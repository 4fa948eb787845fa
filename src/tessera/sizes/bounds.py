"""How large every size may be: those of a config, of a config.json and of the command line.

Beyond a bound lies nothing that could run today. Below all of them every search, loop and table of this package ends
soon, so that what takes sizes from outside checks them here and nowhere else.
"""

from collections.abc import Mapping
from numbers import Integral

from tessera.core.errors import UserError

RANKS = 2**18
"""Processes of a run, and the size of each axis of its mesh."""
RANKS_HERE = 1024
"""Processes of one machine."""
RANKS_SHOWN = 4096
"""Ranks whose parts `inspect` lists one by one."""
RANK_COUNTS = 64
"""Numbers of devices that `count` compares."""
ROWS = 2**20
"""Rows of a micro batch."""
MICRO_BATCHES = 2**16
"""Micro batches of an optimizer step."""
TOKENS = 2**26
"""Tokens of a row."""
STEPS = 10**12
"""Optimizer steps, rows and checkpoints to count."""
PROFILED = 100
"""Optimizer steps that are profiled."""
EPOCHS = 10**6
VOCABULARY = 2**24
TRAINED_VOCABULARY = 2**21
"""Entries of a tokenizer that is trained on the data, which reserves memory for all of them."""
ADDED_TOKENS = 2**16
"""Tokens that a config adds to a tokenizer."""
WIDTH = 2**20
"""Features of a layer."""
LAYERS = 4096
POSITIONS = 2**31 - 1
SEED = 2**63 - 1
NUMBER = 1e100
"""A rate, a decay or a norm: its square is far from the end of float64."""
MINUTES = 10**6
GIB = 10**6
RESTARTS = 10**6

MODEL_SIZES: Mapping[str, int] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": WIDTH,
    "num_key_value_heads": WIDTH,
    "head_dim": WIDTH,
    "max_position_embeddings": POSITIONS,
    "original_max_position_embeddings": POSITIONS,
    "sliding_window": POSITIONS,
    "n_embd": WIDTH,
    "n_inner": WIDTH,
    "n_layer": LAYERS,
    "n_head": WIDTH,
    "n_positions": POSITIONS,
}
"""The largest value of each whole number of a config.json; the smallest is 1."""

MODEL_NUMBERS: Mapping[str, tuple[float, float]] = {
    "rms_norm_eps": (0, 1),
    "layer_norm_epsilon": (0, 1),
    "attention_dropout": (0, 1),
    "embd_pdrop": (0, 1),
    "attn_pdrop": (0, 1),
    "resid_pdrop": (0, 1),
    "initializer_range": (0, 1000),
    "partial_rotary_factor": (0, 1),
    "rope_theta": (1e-6, 1e15),
    "factor": (1e-6, 1e6),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
}
"""The smallest and the largest value of each other number of a config.json."""


def at_most(key: str, value: int, most: int, what: str) -> None:
    """Raise UserError for a `value` of `key` above `most`; `what` says of what there are so many."""
    if value > most:
        raise UserError(key, value, f"{what}: at most {most:,} are possible", f"at most {most}")


def whole_number(key: str, value: object, least: int) -> int:
    """A `value` of `key`, given from Python. Raises UserError for no whole number, and for one below `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise UserError(key, repr(value), f"is no whole number of at least {least}", f"{key}={least} is the least")
    return int(value)


def of_kind(key: str, value: object, kinds: tuple[type, ...], hint: str) -> None:
    """Raise UserError for a `value` of `key`, given from Python, that is of none of these kinds."""
    if not isinstance(value, kinds):
        raise UserError(key, repr(value), f"is no {' or '.join(kind.__name__ for kind in kinds)}", hint)
