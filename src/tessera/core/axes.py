"""The names of the mesh axes, outermost first: the busiest is innermost, so that its ranks lie inside a machine."""

DATA_AXES = ("replicate", "shard")

SEQUENCE_AXES = ("ring", "ulysses")

MODEL_AXES = ("inner", "depth", "row", "col")

AXES = ("pp", *DATA_AXES, *SEQUENCE_AXES, *MODEL_AXES)
