"""Compare the packages of the image's Python with those that pip would install, for the Dockerfile:

    python3 image_packages.py check CONSTRAINTS NAME...
    python3 image_packages.py missing PLAN

`check` prints the version and place of each package, which change if one is replaced. The exit code is 1 if a
version is not that of the constraints. `missing` reads pip's plan of a fresh installation of this project
(pip install --dry-run --ignore-installed --report PLAN) and prints the packages still to be installed: those
that the image lacks, and those of which this project needs another version.
"""

import json
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "treepo"


def check(constraints: Path, names: list[str]) -> int:
    """Print version and place of each package; return the exit code."""
    pins = read_pins(constraints)
    wrong = 0
    for name in names:
        found = installed(name)
        if found is None or found.partition("+")[0] != pins[name]:  # +cu130: which build it is
            sys.stderr.write(f"{name} is {found or 'not there'}; {constraints} names {pins[name]}\n")
            wrong += 1
        else:
            sys.stdout.write(f"{name} {found} {distribution(name).locate_file('')}\n")
    return 1 if wrong else 0


def read_pins(constraints: Path) -> dict[str, str]:
    """Version by name, from lines NAME==VERSION."""
    lines = constraints.read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def missing(plan: dict[str, Any]) -> list[str]:
    """NAME==VERSION of every planned package that is to be installed, without the project itself."""
    planned = {canonicalize_name(entry["metadata"]["name"]): entry["metadata"] for entry in plan["install"]}
    project = planned.pop(canonicalize_name(PROJECT))
    wanted = {
        canonicalize_name(requirement.name): requirement.specifier
        for requirement in map(Requirement, project["requires_dist"])
    }
    return [
        f"{name}=={metadata['version']}"
        for name, metadata in sorted(planned.items())
        if (found := installed(name)) is None
        or (name in wanted and not wanted[name].contains(found, prereleases=True))
    ]


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    command, file, *names = sys.argv[1:]
    if command == "check":
        sys.exit(check(Path(file), names))
    sys.stdout.writelines(f"{line}\n" for line in missing(json.loads(Path(file).read_text())))
