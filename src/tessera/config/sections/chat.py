"""The keys that say how chats become text, for all data sets of `type: chat_template`."""

from typing import Any

from pydantic import Field

from tessera.config.sections.section import Section


class ChatKeys(Section):
    """The template of chats, and the tokens that end a turn."""

    chat_template: str | None = Field(
        None,
        description="How chats are written: tokenizer_default, the name of a template (chatml, llama3, qwen_25, …), "
        "tokenizer_default_fallback_NAME, or jinja. Unset: tokenizer_default.",
    )
    chat_template_jinja: str | None = Field(None, description="A template of your own, or the path of a file with one.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Values that the template reads, such as {enable_thinking: false}."
    )
    eot_tokens: list[str] | None = Field(
        None,
        description="Tokens that end a turn, learnt as train_on_eot says. Unset: the end-of-sequence token, or the "
        "token that the template writes there.",
    )
