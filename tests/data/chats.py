"""A tokenizer of a model with a chat template, the same in every version of every library."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
)
"""ChatML that marks what the model says."""
UNMARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ("</s>", "<s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>")
_MERGES = "h e, l l, he ll, hell o, Ġ t, i n, Ġt h, Ċ Ċ, # #, ## #, Ġ a, e r, s e, se r, u ser, o n, Ġ ###, : Ċ, r e"


def chat_tokenizer(folder: Path, template: str | None = MARKED, eos: str = "</s>") -> Path:
    """A byte-level BPE of a few merges in `folder`; it opens a text with <s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges, known = [], set(alphabet)
    for pair in (tuple(pair.split()) for pair in _MERGES.split(", ")):
        if set(pair) <= known:
            merges.append(pair)
            known.add("".join(pair))
    words = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token="<s>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder
