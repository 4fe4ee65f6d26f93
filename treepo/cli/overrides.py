"""The KEY=VALUE arguments of the commands that read a YAML file, and their completion in a shell."""

from collections.abc import Iterator
from typing import Annotated

import typer

from treepo.config.base import Section


def complete(context: typer.Context, incomplete: str) -> list[str]:
    """The keys of the command's configuration that begin so, each with its equals sign."""
    from treepo.config.evaluate import EvalConfig
    from treepo.config.rollout import RolloutConfig
    from treepo.config.run import RunConfig

    schemas: dict[str | None, type[Section]] = {"rollout": RolloutConfig, "eval": EvalConfig}
    schema = schemas.get(context.command.name, RunConfig)
    return [f"{key}=" for key in _keys(schema) if key.startswith(incomplete)]


def _keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Override keys of the file, for example sampling.width=8.",
        autocompletion=complete,
    ),
]
