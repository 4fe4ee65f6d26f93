"""A tokenizer without a model folder."""

from collections.abc import Sequence

import numpy as np

from treepo.data.tokenizer import Message, Tokenizer


class Utf8Tokenizer(Tokenizer):
    """One token a byte; a message is its role and its content."""

    def __init__(self) -> None:
        super().__init__(hugging_face=None, end_tokens=(0,))

    def render(self, messages: Sequence[Message]) -> str:
        return "".join(f"[{message['role']}]{message['content']}" for message in messages)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)
