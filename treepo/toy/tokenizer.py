"""A byte-level tokenizer: every text passes through it and comes back, one token a UTF-8 byte."""

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

VOCABULARY = 320
"""Tokens: special ones, reserved ones and the 256 bytes; a multiple of 64."""
PAD, EOS = "<|pad|>", "<|eos|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# A message is its role's token, its content as it stands, and the end token.
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def byte_tokenizer(max_tokens: int) -> PreTrainedTokenizerFast:
    """Special tokens first (pad 0, end 1), then the bytes; `max_tokens` is the model's context."""
    byte_symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = [PAD, EOS, *_ROLES]
    specials += [f"<|reserved_{i}|>" for i in range(VOCABULARY - len(byte_symbols) - len(specials))]
    vocabulary = {symbol: i for i, symbol in enumerate([*specials, *byte_symbols])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        chat_template=_CHAT_TEMPLATE,
        model_max_length=max_tokens,
        clean_up_tokenization_spaces=False,
    )
