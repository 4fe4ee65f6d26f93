#!/bin/sh
# Make the image's virtual environment on top of its own Python: install.sh BUILD WHEELS TARGET
# Fails if a package hides the image's torch or SGLang, is not the pinned version, or does not load.
set -eu
build=$1 wheels=$2 target=$3

install() {
    "$target/bin/python" -m pip install --no-deps --compile "$@"
}

pins() { # PYTHON PACKAGE...
    python=$1
    shift
    "$python" "$build/image_packages.py" check "$build/constraints.txt" "$@"
}

python3 -m venv --system-site-packages --without-pip "$target"
site=$("$target/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
install --requirement "$build/missing.txt" "$wheels"/treepo-*.whl
install --target "$site/transformer-engine" "$wheels"/transformer-engine/*.whl
cp "$build/transformer_engine_path.py" "$site/"
echo 'import transformer_engine_path' >"$site/transformer_engine_path.pth"

# Transformer Engine looks for CUDA's libraries in the folder `nvidia` of site-packages.
cudnn=$(python3 -c 'from importlib.util import find_spec; print(*find_spec("nvidia.cudnn").submodule_search_locations)')
[ -e "$site/nvidia" ] || ln -s "$(dirname "$cudnn")" "$site/nvidia"

scratch=$(mktemp -d)
trap 'rm -r "$scratch"' EXIT
pins python3 sglang torch >"$scratch/image"
pins "$target/bin/python" sglang torch >"$scratch/ours"
cmp "$scratch/image" "$scratch/ours"
pins "$target/bin/python" transformers megatron-core ray math-verify

# Import with and without a driver; an empty library stands in for the driver's.
: >"$scratch/driver.c"
gcc -shared -Wl,-soname,libcuda.so.1 -o "$scratch/libcuda.so.1" "$scratch/driver.c"
imports='from megatron.core.extensions import transformer_engine; print("Transformer Engine:", transformer_engine.HAVE_TE)'
LD_LIBRARY_PATH=$scratch:${LD_LIBRARY_PATH-} "$target/bin/python" -c "$imports" | tee "$scratch/with"
grep -q 'True$' "$scratch/with"
"$target/bin/python" -c "$imports"
