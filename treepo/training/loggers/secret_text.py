"""Keeps secrets out of what a logger is told and what it says."""

import os
import re
from collections.abc import Mapping
from typing import Any

_PASSWORD = re.compile(r"://[^/\s@]*@")  # of a URL, with its user
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|AUTHORIZATION|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 8  # characters; a shorter value may be any word


def without_secrets(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text without passwords of URLs, and without values of environment variables that hold secrets."""
    text = _PASSWORD.sub("://...@", text)
    for name, value in environment.items():
        if len(value) >= _SHORTEST and _SECRET.search(name):
            text = text.replace(value, "...")
    return text


def values_without_secrets(value: Any) -> Any:
    """A copy of plain values, each text of it as `without_secrets` makes it."""
    if isinstance(value, Mapping):
        return {name: values_without_secrets(below) for name, below in value.items()}
    if isinstance(value, list | tuple):
        return [values_without_secrets(below) for below in value]
    return without_secrets(value) if isinstance(value, str) else value
