"""The keys that say where prepared rows lie, and how they are made."""

from pydantic import Field

from tessera.config.sections.section import LocalPath, Section
from tessera.sizes import bounds


class PreparationKeys(Section):
    """Rows are tokenized once, before the run, and used again while data, tokenizer and settings are the same."""

    dataset_prepared_path: LocalPath | None = Field(
        None,
        description="A folder in which runs share prepared rows, each set of them in a subfolder named by the content "
        "of data, tokenizer and settings. Unset: output_dir/prepared, for this run alone.",
    )
    dataset_processes: int | None = Field(
        None,
        ge=1,
        le=bounds.RANKS_HERE,
        description="Threads that tokenize the data. Unset: one for each core that the process may use.",
    )
