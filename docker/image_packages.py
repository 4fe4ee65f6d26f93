"""What the image's Python has against what a user of pip gets, for the Dockerfile:

    python3 image_packages.py check CONSTRAINTS NAME...
    python3 image_packages.py missing PLAN

`check` prints the version and place of each package, which change where one is replaced, and ends with exit
code 1 where a version is not that of the constraints. `missing` reads pip's plan of installing this project
into nothing (pip install --dry-run --ignore-installed --report PLAN) and prints what is still to be installed
beside the image's own packages: those that it lacks, and those of which this project needs another version.
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
    """The exit code."""
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
    """Version by name, of the lines NAME==VERSION."""
    lines = constraints.read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def missing(plan: dict[str, Any]) -> list[str]:
    """NAME==VERSION of every package of the plan that is to be installed, the project itself left out."""
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
