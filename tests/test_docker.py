"""The image's recipe agrees with this project's pins and files. Nothing here builds it: that needs Docker."""

import ctypes.util
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.support.paths import ROOT
from treepo.doctor.checklist import select_checks

sys.path.append(str(ROOT / "docker"))
import image_packages  # type: ignore[reportMissingImports]  # in the folder just named

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = {entry.name: entry.specifier for entry in map(Requirement, PROJECT["dependencies"])}
CONSTRAINTS = image_packages.read_pins(ROOT / "constraints.txt")
OWN = image_packages.read_pins(ROOT / "docker" / "transformer-engine.txt")


def instructions(text: str) -> list[tuple[str, str]]:
    """Each instruction's word and the rest of it, continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1].strip()) for line in joined.splitlines()]


DOCKERFILE = instructions((ROOT / "Dockerfile").read_text())


def given(word: str) -> list[str]:
    return [rest for instruction, rest in DOCKERFILE if instruction == word]


def copied() -> list[str]:
    """The files and folders that are copied from the build's context."""
    copies = [rest.split() for rest in given("COPY")]
    return [
        source
        for words in copies
        if not any(word.startswith("--from") for word in words)
        for source in [word for word in words if not word.startswith("--")][:-1]
    ]


def test_the_base_has_the_pinned_sglang() -> None:
    bases = [rest.split()[0] for rest in given("FROM")]
    assert bases == [f"lmsysorg/sglang:v{CONSTRAINTS['sglang']}-cu130", "base", "base"]
    assert f'base.name="docker.io/{bases[0]}"' in given("LABEL")[0]


def test_constraints_satisfy_the_project() -> None:
    for name, specifier in REQUIRED.items():
        assert specifier.contains(CONSTRAINTS[name]), (name, CONSTRAINTS[name], specifier)


def test_what_the_image_adds_contradicts_no_constraint() -> None:
    for name in OWN.keys() & CONSTRAINTS.keys():
        assert OWN[name] == CONSTRAINTS[name]
    parts = {OWN[f"transformer-engine{part}"] for part in ("", "-cu13", "-torch")}
    assert len(parts) == 1  # they are of one release
    # Megatron-Core asks for CUDA 13's core, which the base has.
    (version,) = parts
    metadata = importlib.metadata.requires("megatron-core") or []
    (wanted,) = [one for one in map(Requirement, metadata) if one.name == "transformer-engine"]
    assert wanted.specifier.contains(version)
    assert wanted.extras == {"core_cu13", "pytorch"}


def test_the_build_fails_if_a_pin_differs() -> None:
    """Every package that this project pins to one version is checked in the image's final environment."""
    pinned = {name for name, wanted in REQUIRED.items() if str(wanted).startswith("==")}
    script = (ROOT / "docker/install.sh").read_text()
    checks = re.findall(r'^pins "\$target/bin/python" ([^>\n]*)', script, flags=re.MULTILINE)
    assert pinned == {name for names in checks for name in names.split()}
    assert "set -eu" in script
    final = DOCKERFILE[max(i for i, (word, _) in enumerate(DOCKERFILE) if word == "FROM") :]
    assert any(word == "RUN" and " sh /build/install.sh /build " in rest for word, rest in final)


def test_every_source_exists_and_every_package_is_a_source() -> None:
    for source in copied():
        assert (ROOT / source).exists(), source
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks", "tests"}
    assert packages <= set(copied())


def test_the_context_holds_exactly_the_sources() -> None:
    """The last pattern that matches decides: all is ignored, the sources are not, compiled modules are."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    first, *admitted, last = [line for line in lines if line and not line.startswith("#")]
    assert (first, last) == ("*", "**/__pycache__")
    assert sorted(admitted) == sorted(f"!{source}" for source in copied())


def test_nothing_looks_like_a_credential() -> None:
    names = " ".join(given("ENV") + given("ARG")).upper()
    assert not re.search(r"TOKEN|SECRET|PASSW|API_?KEY|CREDENTIAL|_KEY\b", names)
    assert "--mount=type=secret" not in " ".join(given("RUN"))


def test_it_runs_as_a_user_with_a_number_who_is_not_root() -> None:
    """Kubernetes' runAsNonRoot wants the number."""
    (user,) = given("USER")
    number = user.split(":")[0]
    assert int(number) > 0
    assert f"--uid {number} " in " ".join(given("RUN"))


def test_how_it_starts() -> None:
    assert given("ENTRYPOINT") == ['["treepo"]']
    (health,) = given("HEALTHCHECK")
    named = re.findall(r'"--only", "([^"]+)"', health)
    # A busy container stays healthy: no check of memory, disk or other things that its run uses up.
    assert [check.name for check in select_checks(named)] == ["packages", "devices"]
    assert f'image.version="{PROJECT["version"]}"' in given("LABEL")[0]
    for rest in given("RUN"):
        assert "pip" not in rest.split() or "--mount=type=cache" in rest  # no package caches in layers


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc makes the stand-in")
@pytest.mark.skipif(ctypes.util.find_library("cuda") is not None, reason="this machine has a driver")
def test_transformer_engine_is_on_the_path_only_with_a_driver(tmp_path: Path) -> None:
    """An empty library stands in for the driver's, under its name."""
    (tmp_path / "transformer-engine").mkdir()
    shutil.copy(ROOT / "docker/transformer_engine_path.py", tmp_path)
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver.c").touch()
    library = tmp_path / "driver" / "libcuda.so.1"
    program = (
        "import sys, transformer_engine_path; print(any('transformer-engine' in path for path in sys.path))"
    )
    for path, expected in ((tmp_path / "nowhere", "False"), (library.parent, "True")):
        if path == library.parent:
            subprocess.run(["gcc", "-shared", "-o", str(library), str(tmp_path / "driver.c")], check=True)
        environment = os.environ | {"LD_LIBRARY_PATH": str(path), "PYTHONPATH": str(tmp_path)}
        result = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert result.stdout.strip() == expected


# docker/image_packages.py


def plan(*packages: tuple[str, str]) -> dict[str, Any]:
    project = {"name": "treepo", "version": "0", "requires_dist": ["Rich>=14", "numpy", "torch==2.11.0"]}
    entries = [{"name": name, "version": version} for name, version in packages]
    return {"install": [{"metadata": entry} for entry in (project, *entries)]}


def test_what_is_missing_is_what_the_image_lacks_or_has_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    image = {"rich": "13.9", "numpy": "1.26", "torch": "2.11.0+cu130", "flashinfer-python": "0.6.15"}
    monkeypatch.setattr(image_packages, "installed", image.get)
    wanted = plan(("rich", "15.0.0"), ("numpy", "2.3.5"), ("torch", "2.11.0"), ("Ray", "2.60.0"),
                  ("flashinfer_python", "0.6.14"))  # fmt: skip
    assert image_packages.missing(wanted) == ["ray==2.60.0", "rich==15.0.0"]


def test_a_pin_that_differs_ends_the_check(tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    packaging = importlib.metadata.version("packaging")
    for pins, code in ((f"packaging=={packaging}\n", 0), ("packaging==0.1\n", 1), ("nosuch==1\n", 1)):
        constraints.write_text("# a comment\n" + pins)
        name = pins.partition("==")[0]
        command = [sys.executable, str(ROOT / "docker/image_packages.py"), "check", str(constraints), name]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == code
        assert (name in result.stderr) == bool(code)


# docker/check.sh, with a `docker` that only records its arguments


@pytest.mark.parametrize(
    ("fails", "gpus", "code"),
    [("", "", 0), ("", "1", 0), ("doctor", "", 1), ("train", "", 1), ("inspect", "", 2)],
)
def test_check_runs_doctor_and_quickstart(fails: str, gpus: str, code: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    programs = {
        "docker": f'echo "$@" >> {log}; case "$*" in *{fails or "nothing"}*) exit 9;; esac',
        "nvidia-smi": "echo GPU 0" if gpus else "exit 9",
    }
    for name, program in programs.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{program}\n")
        path.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "docker/check.sh"), "an-image"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == code, result
    runs = [line for line in log.read_text().splitlines() if line.startswith("run")]
    if fails == "inspect":
        assert not runs
        assert "docker build" in result.stderr
        return
    assert len(runs) == 2  # the quickstart also runs if the doctor failed: its output says more
    for line in runs:
        assert "--rm" in line
        assert ("--gpus all" in line) == bool(gpus)
        assert "an-image" in line
    assert ("an-image works here" in result.stdout) == (code == 0)


@pytest.mark.parametrize(("script", "shell"), [("docker/check.sh", "bash"), ("docker/install.sh", "sh")])
def test_scripts_are_of_their_shell(script: str, shell: str) -> None:
    subprocess.run([shell, "-n", str(ROOT / script)], check=True)
    assert os.access(ROOT / script, os.X_OK)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, str(ROOT / script)], check=True)
