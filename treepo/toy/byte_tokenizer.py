"""A byte-level tokenizer: one token for each UTF-8 byte, and every text decodes to itself.

It is a Qwen2Tokenizer without merges, because transformers loads the tokenizer of every Qwen2 folder as one.
That class composes characters first (Unicode NFC), so a text decodes to its composed form.
"""

from tokenizers.pre_tokenizers import ByteLevel
from transformers import AddedToken, Qwen2Tokenizer

from treepo.data.tokenizer import Tokenizer

VOCABULARY = 320
"""Special tokens, reserved tokens and the 256 bytes; a multiple of 64."""
PAD_ID, EOS_ID = 0, 1
EOS = "<|eos|>"
_PAD = "<|endoftext|>"  # Qwen's name, which its class adds to a vocabulary that lacks it
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# A message is its role's token, its unchanged content, and the end token.
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def byte_tokenizer(max_tokens: int) -> Tokenizer:
    """Make the tokenizer: special tokens first, then the bytes. max_tokens: the model's context length."""
    byte_symbols = sorted(ByteLevel.alphabet())
    specials = [_PAD, EOS, *_ROLES]  # in the order of PAD_ID and EOS_ID
    specials += [f"<|reserved_{i}|>" for i in range(VOCABULARY - len(byte_symbols) - len(specials))]
    tokenizer = Qwen2Tokenizer(
        vocab={symbol: i for i, symbol in enumerate([*specials, *byte_symbols])},
        merges=[],
        unk_token=_PAD,  # never needed: every byte is in the vocabulary
        eos_token=EOS,
        pad_token=_PAD,
        chat_template=_CHAT_TEMPLATE,
        model_max_length=max_tokens,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return Tokenizer(tokenizer, end_tokens=(EOS_ID,))
