"""The text of a chat template: the tokenizer's own, one that comes with this package, or the user's."""

from pathlib import Path
from typing import Any

from tessera.core.errors import UserError
from tessera.core.files import read_text

FALLBACK = "tokenizer_default_fallback_"
_FOLDER = Path(__file__).parent / "formats" / "templates"


def template_names() -> list[str]:
    """The templates that come with this package."""
    return sorted(path.stem for path in _FOLDER.glob("*.jinja"))


def template_text(choice: str | None, own: str | None, tokenizer: Any) -> str:
    """What `chat_template: choice` and `chat_template_jinja: own` name; `tokenizer` is that of transformers.

    UserError: the two do not fit each other, no such template or file, a tokenizer without a template.
    """
    if own is not None and choice not in (None, "jinja"):
        raise UserError("chat_template_jinja", None, f"is given, but chat_template is {choice}", "chat_template: jinja")
    if choice == "jinja" or own is not None:
        if not own:
            raise UserError("chat_template", "jinja", "needs chat_template_jinja", "the template, or the path of one")
        is_path = "{" not in own and "\n" not in own
        return read_text(own, "chat_template_jinja", hint="a template has {{ … }} in it") if is_path else own
    name = choice or "tokenizer_default"
    if name == "tokenizer_default" or name.startswith(FALLBACK):
        if tokenizer.chat_template:
            return str(tokenizer.get_chat_template())
        name = name.removeprefix(FALLBACK)
        if name == "tokenizer_default":
            hint = f"chat_template: {' | '.join(template_names())}, or jinja with chat_template_jinja"
            reason = f"the tokenizer in {tokenizer.name_or_path} has no chat template"
            raise UserError("chat_template", choice, reason, hint)
    if name not in template_names():
        known = f"tokenizer_default, {FALLBACK}NAME, jinja, {', '.join(template_names())}"
        raise UserError("chat_template", choice, "is not known", f"known: {known}")
    return (_FOLDER / f"{name}.jinja").read_text("utf-8")
