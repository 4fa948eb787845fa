"""The table of families. A new one is a file in this folder and a row here; nothing else knows Hugging Face's names."""

from pathlib import Path

from tessera.core.errors import UserError
from tessera.models.config import ModelConfig
from tessera.models.families.family import Family
from tessera.models.families.gpt2 import GPT2
from tessera.models.families.keys import Keys
from tessera.models.families.llama import LLAMA
from tessera.models.families.mistral import MISTRAL
from tessera.models.families.qwen2 import QWEN2
from tessera.models.families.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {"gpt2": GPT2, "llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3}
"""By the model_type of config.json."""


def model_config(content: object, file: Path) -> ModelConfig:
    """The `ModelConfig` of a parsed config.json; `file` is named in errors.

    UserError: an unknown model_type, a missing key, a value that does not fit, a feature that is not built.
    """
    if not isinstance(content, dict):
        raise UserError("base_model", file, "is not a JSON object with keys")
    keys = Keys(content, file)
    family = FAMILIES[keys.choice("model_type", None, {name: name for name in FAMILIES})]
    for alias, key in family.aliases.items():
        if alias in keys.content:
            keys.content.setdefault(key, keys.content[alias])
    if "quantization_config" in keys.content:
        hint = "name the model before quantization"
        raise keys.error("quantization_config", "quantized weights cannot be trained", hint)
    return family.read(keys)
