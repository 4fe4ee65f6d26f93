"""Python and the installed packages, against what this package's own metadata asks for."""

import importlib.metadata as metadata
import importlib.util
import platform
from collections.abc import Callable, Iterable

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from treepo.doctor.outcome import Outcome, failed, passed, skipped, verdict

_PACKAGE = "treepo"
_REINSTALL = "install into a new environment: make setup, or pip install -c constraints.txt treepo"
_NOT_INSTALLED = f"{_PACKAGE} is not installed as a package: nothing says what it needs"


def python() -> Outcome:
    """The interpreter's version."""
    try:
        wanted = metadata.metadata(_PACKAGE)["Requires-Python"]
    except metadata.PackageNotFoundError:
        return failed(_NOT_INSTALLED, _REINSTALL)
    return judge_python(platform.python_version(), wanted)


def judge_python(version: str, wanted: str) -> Outcome:
    good = SpecifierSet(wanted).contains(version, prereleases=True)
    found = f"{version} ({platform.machine()})" if good else f"{version}, needs {wanted}"
    return verdict(good, found, f"make an environment with a Python {wanted}: uv venv --python 3.12")


def packages() -> Outcome:
    """What is installed against what this package requires."""
    try:
        requirements = metadata.requires(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        return failed(_NOT_INSTALLED, _REINSTALL)
    return judge_packages(requirements, installed_version)


def judge_packages(requirements: Iterable[str], installed: Callable[[str], str | None]) -> Outcome:
    """installed: the version of a distribution, None where there is none. Local parts of a version, as in
    2.11.0+cu130, satisfy a pin without one.
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
    return verdict(not wrong, ", ".join(wrong or pinned), _REINSTALL)


def installed_version(name: str) -> str | None:
    """Of a distribution; None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def transformer_engine() -> Outcome:
    """Whether Megatron-Core's layers can be Transformer Engine's. Without it training works, more slowly;
    with one that cannot be imported, also for want of a driver, neither Megatron-Core nor SGLang can be.
    """
    import torch

    if importlib.util.find_spec("transformer_engine") is None:
        if not torch.cuda.is_available():
            return skipped("no GPU: Megatron-Core's own layers are used")
        return skipped(
            "not installed: Megatron-Core's own layers are used, which are slower",
            "the image has it; docs/docker.md says how it is built",
        )
    import transformer_engine.pytorch  # type: ignore  # noqa: F401  # of CUDA machines

    return passed(metadata.version("transformer-engine"))
