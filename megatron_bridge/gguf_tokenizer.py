"""Makes the tokenizer of a GGUF file: byte-level BPE, with the split of words that the file names.

The file has vocabulary, merges and the name of the split (`tokenizer.ggml.pre`), not the split itself; each
name here stands for what the Hugging Face tokenizer of those models does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AddedToken, PreTrainedTokenizerFast

from megatron_bridge.gguf_header import Value
from treepo.errors import ModelError

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # of tokenizer.ggml.token_type
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Split:
    """How a text becomes words. digits: of a number in one word, as a pattern; None: GPT-2's pattern."""

    digits: str | None = None
    single_digits: bool = False  # numbers are divided before GPT-2's pattern
    composed: bool = False  # Unicode NFC
    whole_words: bool = False  # a word of the vocabulary is one token, whatever the merges say
    starts: bool = False  # a text starts with the BOS token, unless the file says otherwise

    def steps(self) -> list[Any]:
        if self.digits is None:
            digits = [pre_tokenizers.Digits(individual_digits=True)] if self.single_digits else []
            return [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        pattern = pre_tokenizers.Split(Regex(_WORDS % self.digits), "isolated")
        return [pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


_SPLITS = {
    "gpt-2": _Split(),
    "smollm": _Split(single_digits=True),
    "qwen2": _Split(digits="", composed=True),
    "llama-bpe": _Split(digits="{1,3}", whole_words=True, starts=True),
}


def gguf_tokenizer(path: Path, metadata: Mapping[str, Value], max_tokens: int) -> PreTrainedTokenizerFast:
    """The tokenizer with its special tokens and chat template. max_tokens: the model's context length.

    Raises ModelError for a kind of tokenizer or a split that is not in `_SPLITS`.
    """
    read = _Reader(path, metadata)
    read.one_of("model", ["gpt2"])
    split = _SPLITS[read.one_of("pre", list(_SPLITS))]
    tokens, types = read.texts("tokens"), read.numbers("token_type")
    if len(types) != len(tokens):
        raise ModelError(
            f"{path}: {len(tokens)} tokens, but {len(types)} values of tokenizer.ggml.token_type"
        )
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
    tokenizer = Tokenizer(BPE(vocabulary, read.merges(vocabulary), ignore_merges=split.whole_words))
    tokenizer.normalizer = normalizers.NFC() if split.composed else None  # type: ignore[assignment]  # its stub lacks None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split.steps())  # type: ignore[assignment]  # as above
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]  # as above
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [token for token, of in zip(tokens, types, strict=True) if of == kind]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in added])
    ids = {name: token_id(path, metadata, key) for name, key in _NAMED.items()}
    named = {name: tokens[number] for name, number in ids.items() if number is not None}
    first = ids["bos_token"]
    if metadata.get("tokenizer.ggml.add_bos_token", split.starts) and first is not None:
        bos = tokens[first]
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]  # as above
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, first)]
        )
    if metadata.get("tokenizer.ggml.add_eos_token"):
        raise ModelError(f"{path}: tokenizer.ggml.add_eos_token = true; prompts would end before the answer")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=read.template(),
        model_max_length=max_tokens,
        clean_up_tokenization_spaces=False,
        **named,
    )


_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""transformers' and GGUF's names of special tokens."""


def token_id(path: Path, metadata: Mapping[str, Value], name: str) -> int | None:
    """The number of the special token `name`, such as "eos"; None if the file names none."""
    found, tokens = metadata.get(f"tokenizer.ggml.{name}_token_id"), metadata.get("tokenizer.ggml.tokens")
    many = len(tokens) if isinstance(tokens, list) else 0
    if found is not None and (type(found) is not int or not 0 <= found < many):
        raise ModelError(f"{path}: tokenizer.ggml.{name}_token_id = {found!r}; the file has {many} tokens")
    return found


class _Reader:
    """Reads keys below `tokenizer.ggml.`; a missing or wrong value is a ModelError."""

    def __init__(self, path: Path, metadata: Mapping[str, Value]) -> None:
        self._path, self._metadata = path, metadata

    def one_of(self, name: str, allowed: list[str]) -> str:
        found = self._metadata.get(f"tokenizer.ggml.{name}")
        if found not in allowed:
            raise ModelError(
                f"{self._path}: tokenizer.ggml.{name} = {found!r} is not supported; {', '.join(allowed)} "
                f"{'is' if len(allowed) == 1 else 'are'} (byte-level BPE)"
            )
        return str(found)

    def texts(self, name: str) -> list[str]:
        found = self._metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(found, list) or not found or not isinstance(found[0], str):
            raise ModelError(f"{self._path}: tokenizer.ggml.{name} must be a list of texts")
        return found  # type: ignore[return-value]  # all values of a GGUF list have one type

    def numbers(self, name: str) -> list[int]:
        found = self._metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(found, list) or not found or type(found[0]) is not int:
            raise ModelError(f"{self._path}: tokenizer.ggml.{name} must be a list of whole numbers")
        return found  # type: ignore[return-value]  # as above

    def template(self) -> str | None:
        found = self._metadata.get("tokenizer.chat_template")
        if found is not None and not isinstance(found, str):
            raise ModelError(f"{self._path}: tokenizer.chat_template must be a text")
        return found

    def merges(self, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
        merges = []
        for number, line in enumerate(self.texts("merges")):
            left, space, right = line.partition(" ")
            if not space or not {left, right, left + right} <= vocabulary.keys():
                raise ModelError(
                    f"{self._path}: tokenizer.ggml.merges[{number}] = {line!r} is no merge of tokens"
                )
            merges.append((left, right))
        return merges
