#!/bin/sh
# Make a virtual environment with the packages of pyproject.toml: ./setup.sh [FOLDER]
# It looks for a working Python 3.12 on the PATH, in uv and in pyenv; PYTHON=... names one.
set -eu

venv=${1:-.venv}

is_usable() { # a shim on the PATH may refuse to run, and some systems ship 3.12 without venv
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null
}

find_python() {
    for candidate in ${PYTHON:-} python3.12 python3 python \
        "$(uv python find 3.12 2>/dev/null || true)" \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python /usr/local/bin/python3.12 /opt/*/bin/python3.12; do
        if [ -n "$candidate" ] && is_usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "treepo needs Python 3.12 with venv and found none: install it (Debian, Ubuntu: apt install" \
        "python3.12-venv; any Linux: uv python install 3.12) or name one with PYTHON=/path/to/python3.12" >&2
    exit 2
}

python=$(find_python)
echo "Installing into $venv with $("$python" --version): about 9 GB, minutes on the first time"
"$python" -m venv --clear "$venv"
if command -v uv >/dev/null 2>&1; then
    uv pip install --quiet --compile-bytecode --python "$venv/bin/python" -c constraints.txt -e . --group dev
else
    "$venv/bin/python" -m pip install --quiet --upgrade "pip>=25.1" # the first version with --group
    "$venv/bin/python" -m pip install --quiet --compile -c constraints.txt -e . --group dev
fi
