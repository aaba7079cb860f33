#!/bin/bash
# Measures the cost of capture on an NVIDIA GPU in under 8 minutes: bash benchmarks/gpu.sh [FOLDER OF WHEELS] [OPTIONS]
#
# It needs python3 (PYTHON=... names another interpreter) with torch for CUDA, transformers, pyarrow, numpy, psutil,
# tqdm, safetensors, hydra-core, omegaconf and antlr4-python3-runtime. The last three may come as wheels in a folder.
# It downloads nothing.
# On a machine with a network: pip wheel --no-deps -w wheels hydra-core==1.3.8 omegaconf==2.3.1 antlr4-python3-runtime==4.9.3
# It passes its options to benchmarks/gpu.py. --folder names a fast disk for the journals.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
if [[ $# -gt 0 && -d $1 ]]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$1"/*.whl
    export PYTHONPATH=$site
    shift
fi
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} "$PYTHON" benchmarks/gpu.py "$@"
