"""The small model's own tokenizer: one token a character, one for each reasoning and answer tag."""

from __future__ import annotations

import string

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHARACTERS = "\n " + string.digits + string.ascii_letters + string.punctuation
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(reasoning_tag: str = "think", answer_tag: str = "answer") -> PreTrainedTokenizerFast:
    """A tokenizer of printable ASCII, character by character.

    `<think>`, `</think>`, `<answer>`, `</answer>` are single tokens and not special: they survive
    `decode(skip_special_tokens=True)`. The roles of the chat template and pad, bos, eos, unk are
    special. A system message is optional. Nothing is added around an encoded text.
    """
    specials = [PAD, BOS, EOS, UNKNOWN, *ROLES]
    vocabulary = {token: number for number, token in enumerate([*specials, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tags = [f"<{slash}{tag}>" for tag in (reasoning_tag, answer_tag) for slash in ("", "/")]
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
