"""The keys that say how a run's model is written, and what its numbers are measured by."""

from typing import Literal

from pydantic import Field

from tessera.config.sections.section import Section
from tessera.sizes import bounds


class OutputKeys(Section):
    """What a run leaves and shows."""

    save_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None,
        description="The dtype of the final model. Unset: that of base_model; float32 with random_init. "
        "Checkpoints keep the dtypes of training.",
    )
    device_peak_tflops: float | None = Field(
        None,
        gt=0,
        le=bounds.NUMBER,
        description="TFLOP/s that one device is sold with in the dtype of the run, by which MFU is measured. Unset: as "
        "known for some GPUs in bfloat16; for others no MFU is shown.",
    )
