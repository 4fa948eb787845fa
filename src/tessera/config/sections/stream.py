"""The keys of data that are read while the run goes."""

from pydantic import Field

from tessera.config.sections.section import Section


class StreamKeys(Section):
    """A stream: texts without end, tokenized when they are needed."""

    streaming: bool = Field(
        False,
        description="Read and tokenize the texts of datasets while the run goes, in the order of the files, again and "
        "again until max_steps; documents follow one another, and rows of sequence_len are cut from them.",
    )
    dataloader_num_workers: int = Field(
        1, ge=0, le=64, description="streaming: processes that tokenize, for each process of the run; 0: its own."
    )
    dataloader_prefetch_factor: int = Field(
        2, ge=1, le=1000, description="streaming: steps that are kept ready before they are needed."
    )
