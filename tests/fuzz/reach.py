"""Which openers, readers and validators there are, found by their names in the modules that read from outside."""

import ast
import builtins
import importlib
import inspect
import re
from collections.abc import Iterator
from types import CodeType, FunctionType

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
    "data.parts.Part.rows",  # counts, and reads nothing
    # what writes, or only says what others have found
    "data.prepare.Prepared.tokenizer_folder",
    "models.hub.StoredParameters.dtype",
    # of several ranks alone, which no case starts
    "train.run.Run.from_json",
    "checkpoint.tensors.load_model",
    # reads what the same process has just written
    "data.samples.read_rows",
}


reached: set[str] = set()
"""The readers that this process has called since it was last cleared, once `note_readers` has been called."""


def readers() -> set[str]:
    """The name of each."""
    return {name for module in MODULES for name, _ in _functions(module)}


def note_readers() -> None:
    """From now on in this process: each reader, when it is called, puts its name into `reached`.

    They begin with a line that does so; a tracer would slow down all that is called.
    """
    setattr(builtins, _NOTE, reached.add)
    for module in MODULES:
        loaded = importlib.import_module(f"tessera.{module}")
        tree = _Noting(module).visit(ast.parse(inspect.getsource(loaded)))
        codes = dict(_codes(compile(ast.fix_missing_locations(tree), str(loaded.__file__), "exec")))
        for _, function in _functions(module):
            function.__code__ = codes[_place(function.__code__)]


_NOTE = "_note_of_a_reader"


class _Noting(ast.NodeTransformer):
    """Has every function of a module, and every method of its classes, begin with a note of its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.body = [_Noting(f"{self.name}.{node.name}").visit(inner) for inner in node.body]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        note = ast.parse(f"{_NOTE}({f'{self.name}.{node.name}'!r})").body
        node.body[:0] = [ast.copy_location(line, node.body[0]) for line in note]
        return node


def _codes(code: CodeType) -> Iterator[tuple[tuple[str, int], CodeType]]:
    yield _place(code), code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _place(code: CodeType) -> tuple[str, int]:
    return code.co_qualname, code.co_firstlineno


def _functions(module: str) -> Iterator[tuple[str, FunctionType]]:
    """The readers of a module with their names."""
    loaded = importlib.import_module(f"tessera.{module}")
    for name, member in vars(loaded).items():
        if getattr(member, "__module__", None) != loaded.__name__:
            continue
        members = vars(member) if inspect.isclass(member) else {"": member}
        for inner, function in members.items():
            for wrapper in ("wrapped", "__wrapped__", "__func__", "fget"):
                function = getattr(function, wrapper, function)
            whole = f"{module}.{name}.{inner}".rstrip(".")
            if isinstance(function, FunctionType) and NAMES.search(inner or name) and whole not in NOT_READERS:
                yield whole, function
