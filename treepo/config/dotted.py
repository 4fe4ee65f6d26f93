"""Settings by dotted key, as the command line and error messages name them."""

from typing import Any


def by_dotted_key(value: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings and lists by dotted key; a list's items by their index."""
    items = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    )
    if items is None:
        return {prefix: value}
    return {
        dotted: leaf
        for key, below in items
        for dotted, leaf in by_dotted_key(below, f"{prefix}.{key}" if prefix else str(key)).items()
    }
