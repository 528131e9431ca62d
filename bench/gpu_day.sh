#!/bin/bash
# All that a GPU is needed for, in the order of its worth, each step with a time limit:
#   bash bench/gpu_day.sh [folder for results]
# Needs torch with CUDA and triton; nothing is installed or downloaded. Exit status: 1 if a kernel is wrong.
set -u
cd "$(dirname "$0")/.."
out=${1:-${OUT:-bench/results}}
mkdir -p "$out"
export PYTHONPATH=.:kernels:pipelines PYTHONUNBUFFERED=1
failed=0

step() {  # step SECONDS NAME COMMAND...
    local seconds=$1 name=$2 start=$SECONDS
    shift 2
    echo "== $name"
    timeout "$seconds" "$@" 2>&1 | tee "$out/$name.txt"
    local status=${PIPESTATUS[0]}
    [ "$status" = 124 ] && echo "stopped after $seconds seconds"
    echo "== $name: status $status, $((SECONDS - start)) s"
    return "$status"
}

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,power.limit --format=csv
python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)' || exit 2

step 240 check python3 bench/gpu_kernels.py check || failed=1
step 150 time python3 bench/gpu_kernels.py time --providers triton,eager --seconds 120 --out "$out/gpu_kernels.jsonl" || failed=1
step 180 compile python3 bench/gpu_kernels.py time --providers triton,compile --seconds 120 --out "$out/gpu_compile.jsonl"
exit "$failed"
