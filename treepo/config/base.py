"""The base of every configuration section: strict, frozen, unknown keys refused."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A part of the YAML file. The string under each field is its documentation."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


PathField = Annotated[Path, Field(strict=False)]
"""A file or folder; YAML has only strings for it."""
