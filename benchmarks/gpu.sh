#!/bin/bash
# Measures and checks capture on an NVIDIA GPU in 6 minutes: bash benchmarks/gpu.sh [FOLDER OF WHEELS] [OPTIONS]
#
# It needs python3 (PYTHON=... names another interpreter) with torch for CUDA, transformers, accelerate, pyarrow, numpy,
# psutil, safetensors, tqdm and xxhash, and hydra-core, omegaconf, antlr4-python3-runtime and msgspec, which may come as
# wheels in a folder. It downloads nothing. On a machine with a network and the same version of Python:
#   pip wheel --no-deps -w wheels -c constraints.txt hydra-core omegaconf antlr4-python3-runtime msgspec
# It passes its options to `benchmarks/gpu/`: `--help` lists them.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
path=$PWD:$PWD/benchmarks
if [[ $# -gt 0 && -d $1 ]]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$1"/*.whl
    path=$path:$site
    shift
fi
# The profiler, which names the kernels, is quiet from this level on.
export KINETO_LOG_LEVEL=99
PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} "$PYTHON" -m gpu "$@"
