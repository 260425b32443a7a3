#!/usr/bin/env bash
# The tests under the lowest versions that pyproject.toml names: an environment of its own, by uv, from wheels alone.
#
#   tests/lowest.sh                        a temporary folder, and all tests in two processes
#   tests/lowest.sh FOLDER                 an environment that is kept, and made only if FOLDER has none yet
#   tests/lowest.sh FOLDER tests/training/test_loop.py -x      arguments of pytest in the place of "-n 2"
#   PYTHON=python3.13 tests/lowest.sh      another Python; RESOLUTION=highest: the newest versions there are
#
# Without constraints.txt torch is a CUDA build, 3 GB of downloads and 7 GB on the disk: by hand, not in CI.
set -euo pipefail

python="$(command -v "${PYTHON:-python}")"
folder="${1:-}"
if [[ -n "$folder" ]]; then
    shift
    mkdir -p "$folder"
    folder="$(cd "$folder" && pwd)"
else
    folder="$(mktemp -d)"
    trap 'rm -rf "$folder"' EXIT
fi
(($#)) || set -- -n 2

cd "$(dirname "$0")/.."
if [[ -z "${PYRO_MM_DATA:-}" && -d ../shared/data ]]; then
    PYRO_MM_DATA="$(cd ../shared/data && pwd)"
    export PYRO_MM_DATA
fi
export OMP_NUM_THREADS=1 PYTHONPATH=

if [[ ! -f "$folder/installed" ]]; then
    "$python" -m venv "$folder/tools"
    "$folder/tools/bin/python" -m pip install -q uv
    uv=("$folder/tools/bin/uv" --quiet pip)
    "$python" -m venv "$folder/venv"
    # the package itself is the one thing that is built: it may come from no wheel
    "${uv[@]}" install --python "$folder/venv/bin/python" \
        --resolution "${RESOLUTION:-lowest-direct}" --only-binary :all: --no-binary pyro-mm '.[test]'
    "${uv[@]}" list --python "$folder/venv/bin/python" > "$folder/installed"
fi
cat "$folder/installed"
"$folder/venv/bin/python" -m pytest "$@"
