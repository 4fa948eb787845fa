"""The keys that say how samples lie in rows."""

from pydantic import Field

from tessera.config.sections.section import Section


class PackingKeys(Section):
    """One sample a row, or as many as fit."""

    sample_packing: bool = Field(
        False,
        description="Put whole samples behind one another into rows of sequence_len: each has its own positions and "
        "attends to itself alone. micro_batch_size counts such rows.",
    )
    eval_sample_packing: bool | None = Field(
        None, description="The same for the rows held out; the loss is the same. Unset: as sample_packing."
    )
    pad_to_sequence_len: bool | None = Field(
        None,
        description="Pad every row to sequence_len instead of to the longest of its micro-batch. Rows of packed "
        "samples always are.",
    )

    @property
    def packs_held_out(self) -> bool:
        """Whether the samples held out are packed."""
        return self.sample_packing if self.eval_sample_packing is None else self.eval_sample_packing
