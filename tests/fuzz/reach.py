"""Which openers, readers and validators there are, found by their names in the modules that read from outside."""

import importlib
import inspect
import re
from types import CodeType
from typing import Any

MODULES = (
    "core.files", "config.load", "config.compat", "config.schema", "config.problems", "config.settled",
    "config.overrides", "config.deepspeed", "config.fsdp1", "config.sections.data",
    "config.sections.checkpoints", "config.sections.layout", "config.sections.model", "config.sections.optimizer",
    "config.sections.section", "sizes.geometries", "sizes.rules", "sizes.remedies", "models.hub",
    "models.tensor_files", "models.families.table", "models.families.keys", "models.families.llama",
    "models.families.qwen3", "models.families.gpt2", "models.families.qwen2", "models.families.mistral",
    "models.beside", "cli.keys", "data.sources", "data.found", "data.hub", "data.parts", "data.rows", "data.make",
    "data.manifest", "data.added_tokens", "data.formats.container", "data.formats.tables", "data.formats.json_rows",
    "data.formats.known", "data.formats.chat", "data.formats.template", "data.formats.bounded",
    "data.formats.prompts", "data.formats.pairs", "data.formats.text", "data.formats.tokenized",
    "data.auto_tokenizer", "data.tokenizer",
    "data.prepare", "data.samples", "checkpoint.folder", "checkpoint.state", "checkpoint.tensors",
    "checkpoint.convert", "train.run", "launch.options",
)  # fmt: skip
NAMES = re.compile(
    r"(^|_)(read|open|load|find|check|verify|parse|recognise|resolve|latest|whole|problems?|misfits?|asked|place|kind|digest|"
    r"from_json|json_lines|string|integers|size|number|flag|choice|section|well_formed|bytes_of|token_sample|line|alpaca|"
    r"chat|pair|input_output|completion|braces|parts|tools|template|render|bounded|rows|lines|names|identify|recognised|"
    r"opened|unpacked|start|saved|chosen|matching|hub_files|of_folder|of_split|sorted_out|single|powers|prompted|written|"
    r"metadata|find_class|not_whole|altered|refusal|eos|held_out|agree|given|geometry|divides?)(_|$)"
)
NOT_READERS = {
    "data.added_tokens.TokenizerSettings.vocab_size",
    "data.formats.template.template_names",
    "data.make._write_rows",
    # what writes, or only says what others have found
    "data.prepare.Prepared.tokenizer_folder",
    "models.hub.StoredParameters.dtype",
    # of several ranks alone, which no case starts
    "train.run.Run.from_json",
    "checkpoint.tensors.load_model",
    # reads what the same process has just written
    "data.samples.read_rows",
}

RARELY = {
    "config.fsdp1._settle_section",
    "config.schema._check_stream",
    "data.formats.chat._parts_within",
    "data.formats.container.refuse_rows",
    "data.formats.pairs.prompt_completion",
    "data.found._chosen",
    "data.found._matching",
    "data.found._saved",
    "data.parts.parts_of",
}
"""Readers that no case which always runs comes to, only tests of their own: cases for them are still to be written."""


def readers() -> dict[CodeType, str]:
    """The code of each, with its name."""
    found: dict[CodeType, str] = {}
    for module in MODULES:
        loaded = importlib.import_module(f"tessera.{module}")
        for name, member in vars(loaded).items():
            if inspect.isclass(member) and member.__module__ == loaded.__name__:
                for inner, method in vars(member).items():
                    _enter(found, f"{module}.{name}.{inner}", inner, method)
            elif getattr(member, "__module__", None) == loaded.__name__:
                _enter(found, f"{module}.{name}", name, member)
    return found


def _enter(found: dict[CodeType, str], whole_name: str, name: str, member: Any) -> None:
    member = getattr(member, "wrapped", getattr(member, "__wrapped__", getattr(member, "__func__", member)))
    if isinstance(member, property):
        member = member.fget
    code = getattr(member, "__code__", None)
    if code is not None and NAMES.search(name) and whole_name not in NOT_READERS:
        found[code] = whole_name
