"""Compares Python and the installed packages with the requirements in this package's metadata."""

import importlib.metadata as metadata
import importlib.util
import platform
from collections.abc import Callable, Iterable

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from treepo.doctor.check import Outcome, failed, passed, passed_if, skipped

_PACKAGE = "treepo"
_REINSTALL = "install into a new environment: make setup, or pip install -c constraints.txt treepo"
_NOT_INSTALLED = f"{_PACKAGE} is not installed as a package, so its requirements are unknown"


def python() -> Outcome:
    """The interpreter's version must be one that this package supports."""
    try:
        wanted = metadata.metadata(_PACKAGE)["Requires-Python"]
    except metadata.PackageNotFoundError:
        return failed(_NOT_INSTALLED, _REINSTALL)
    return judge_python(platform.python_version(), wanted)


def judge_python(version: str, wanted: str) -> Outcome:
    good = SpecifierSet(wanted).contains(version, prereleases=True)
    found = f"{version} ({platform.machine()})" if good else f"{version}, needs {wanted}"
    return passed_if(good, found, f"make an environment with Python {wanted}: uv venv --python 3.12")


def packages() -> Outcome:
    """Every requirement of this package must be installed in a version that it allows."""
    try:
        requirements = metadata.requires(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        return failed(_NOT_INSTALLED, _REINSTALL)
    return judge_packages(requirements, installed_version)


def judge_packages(requirements: Iterable[str], installed: Callable[[str], str | None]) -> Outcome:
    """installed: returns a distribution's version, None if it is not installed.

    A local version such as 2.11.0+cu130 satisfies a pin without one. If all is well the outcome lists the
    pinned packages.
    """
    pinned, wrong = [], []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed(requirement.name)
        if version is None:
            wrong.append(f"{requirement.name} is missing (needs {requirement.specifier or 'any'})")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version} (needs {requirement.specifier})")
        elif any(part.operator == "==" for part in requirement.specifier):
            pinned.append(f"{requirement.name} {version}")
    return passed_if(not wrong, ", ".join(wrong or pinned), _REINSTALL)


def installed_version(name: str) -> str | None:
    """A distribution's version, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def transformer_engine() -> Outcome:
    """Transformer Engine must be importable if it is installed.

    Training works without it, more slowly. A broken installation, or one without a driver, stops
    Megatron-Core and SGLang.
    """
    import torch

    if importlib.util.find_spec("transformer_engine") is None:
        if not torch.cuda.is_available():
            return skipped("no GPU: Megatron-Core's own layers are used")
        return skipped(
            "not installed: Megatron-Core's own layers, which are slower, are used",
            "the Docker image has it; docs/docker.md says how to build it",
        )
    import transformer_engine.pytorch  # type: ignore  # noqa: F401  # on CUDA machines only

    return passed(metadata.version("transformer-engine"))
