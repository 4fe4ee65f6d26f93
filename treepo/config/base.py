"""What all configuration sections share: strict and frozen models, paths, names from a registry."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema


class Section(BaseModel):
    """A section of the YAML file; unknown keys, inf and nan are refused. A field's string documents it."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


PathField = Annotated[Path, Field(strict=False)]
"""A file or folder; YAML has only strings for it."""


@dataclass(frozen=True, slots=True)
class Registered:
    """Annotates a string that must be a name in `registry`: `Annotated[str, Registered(ESTIMATORS)]`.

    The registry is read whenever a value is checked or documented, so an entry added to it is a valid value.
    """

    registry: Mapping[str, object]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return handler(schema) | {"enum": sorted(self.registry)}

    def _check(self, name: str) -> str:
        if name not in self.registry:
            raise ValueError(unknown_name(name, self.registry))
        return name


def unknown_name(name: str, names: Iterable[str]) -> str:
    """The error of a value that is none of `names`: what is allowed, what was found, which is nearest."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"should be one of {', '.join(sorted(names))}, found {name!r}{hint}"


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a key of this type holds: by itself, in a list, or as one of several forms."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for one in get_args(annotation) if (found := section_in(one)) is not None), None)
