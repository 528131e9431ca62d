#!/bin/bash
# All that a GPU is needed for, in slices of at most 9 minutes, in the order of their worth:
#   bash bench/gpu_day.sh N           one slice; `bash bench/gpu_day.sh` lists them
# Each goes on where an earlier call of it stopped. Results are in bench/results/<gpu>/: a file of results per suite, with its
# table, and a log per slice. Nothing is installed or downloaded; needed are torch with CUDA, Triton, and the packages of
# fastmim but DeepSpeed (pytest, DALI, FFCV and xformers are not). What is missing may lie in build/packages
# (pip install --target build/packages tyro ...), which is looked into first.
# FASTMIM_GPU_DAY_DRY=1, or no GPU: the same on CPU tensors at tiny sizes, into FASTMIM_GPU_DAY_OUT or runs/gpu_day-dry.
# FASTMIM_COMMIT=$(git describe --always --dirty=+) names the checkout in the results where a copy of it has no history.
# Exit status: 0, 1 if a kernel is wrong or a suite failed, 2 for another number or a missing package, 124 out of time.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH=build/packages:.:kernels:pipelines:bench${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
seconds=520
python=${PYTHON:-python3}

slices=(
    "numerics: every case of every kernel against the reference"
    "kernels: speed of every kernel against eager torch"
    "mae: steps of ViT-B, all ways, and their profile"
    "mae-large: steps of ViT-L"
    "cmae: steps of ViT-B, all ways, and their profile"
    "cae: steps of ViT-B, all ways, and their profile"
    "mixedae, icmae, simmim: steps of ViT-B, all ways, and their profiles"
    "compiled: every kernel against torch.compile"
    "stock-max: MAE ViT-B against torch.compile(max-autotune)"
    "e2e: runs of the trainer on pictures and without"
    "loaders: by CPU time per image"
    "batches: MAE and CMAE ViT-B at 64 and 1024 images"
    "fp8: MAE ViT-L with 8-bit products and without"
)

list() {
    echo "usage: bash bench/gpu_day.sh N"
    local i
    for i in "${!slices[@]}"; do echo "  $((i + 1)) ${slices[$i]}"; done
}

if ! [[ ${1:-} =~ ^[0-9]+$ ]] || [ "$1" -lt 1 ] || [ "$1" -gt ${#slices[@]} ]; then
    list
    exit 2
fi
slice=$1

gpu=$($python - <<'PY'
import importlib.util
import sys

wanted = {"torch": "torch", "numpy": "numpy", "PIL": "pillow", "yaml": "pyyaml", "rich": "rich", "safetensors": "safetensors",
          "tyro": "tyro"}
missing = [package for name, package in wanted.items() if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"missing: {', '.join(missing)}; pip install --target build/packages {' '.join(missing)}")
import torch

print(torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "")
PY
) || exit 2
dry=${FASTMIM_GPU_DAY_DRY:-}
[ -z "$gpu" ] && dry=1
if [ -n "$dry" ]; then
    export CUDA_VISIBLE_DEVICES=
    out=${FASTMIM_GPU_DAY_OUT:-runs/gpu_day-dry}
    # Compiling takes longer than all the rest.
    export FASTMIM_BENCH_COMPILE=0
    base="--models vit_pico --batch-sizes 4 --image-size 32 --patch-size 8 --rounds 3 --checked 2 --seconds 5"
    large=$base batches=$base profile="--model vit_pico --batch-size 4 --image-size 32 --patch-size 8"
    kernels="--ops gather,masks --seconds 20" checked="--ops gather,masks"
    e2e="--drawn 40 --steps 6" trained="--method mae --preset demo --batch-size 4"
    loader="--drawn 64 --images 64 --rounds 1 --only ^fastmim.folder$"
else
    out=${FASTMIM_GPU_DAY_OUT:-bench/results/$gpu}
    base="--models vit_base --batch-sizes 256 --rounds 60 --seconds 45"
    large="--models vit_large --batch-sizes 256 --rounds 40 --seconds 45"
    batches="--models vit_base --batch-sizes 64 1024 --rounds 40 --seconds 30"
    profile="--model vit_base --batch-size 256"
    kernels="--seconds 420" checked=""
    e2e="--drawn 1500 --steps 150" trained="--method mae --preset paper --batch-size 256"
    loader="--drawn 1000 --images 3000 --rounds 3"
fi
mkdir -p "$out"
log=$out/slice-$slice.log
failed=0
began=$SECONDS

run() {  # run COMMAND...: with what is left of the slice's time
    local left=$((seconds - SECONDS + began))
    [ "$left" -lt 10 ] && { echo "== no time left for: $*; the same command goes on"; failed=124; return; }
    echo "== $*"
    timeout -k 10 "$left" $python "$@"
    local status=$?
    echo "== status $status, $((SECONDS - began)) s of $seconds"
    [ "$status" = 0 ] || failed=$status
}

steps() { run bench/bench_step.py --json "$out/steps.jsonl" "$@"; }
# What matters most comes first: compiling every block may outlast a slice, and a case counts once it is whole.
# Without graphs first: a fault of the device takes all ways of its process along.
most() {
    steps --providers ours official "$@"
    steps --providers ours graph official stock "$@"
}
profiled() { run bench/profile_step.py --json "$out/profiles.jsonl" $profile --methods "$@"; }

main() {
    command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,power.limit --format=csv
    echo "slice $slice, ${slices[$((slice - 1))]}; ${gpu:-no GPU}${dry:+, a rehearsal on CPU tensors}"
    case $slice in
    1) run bench/gpu_kernels.py check --out "$out/checks.jsonl" $checked ;;
    2) run bench/gpu_kernels.py time --providers ours,eager --out "$out/kernels.jsonl" $kernels ;;
    3) most --methods mae $base; profiled mae --ways ours official; steps --methods mae $base ;;
    4) most --methods mae $large; steps --methods mae $large ;;
    5) most --methods cmae $base; profiled cmae --ways ours official; steps --methods cmae $base ;;
    6) most --methods cae $base; profiled cae; steps --methods cae $base ;;
    7) most --methods mixedae icmae simmim $base; profiled mixedae icmae simmim; steps --methods mixedae icmae simmim $base ;;
    8) run bench/gpu_kernels.py time --providers ours,compile --out "$out/kernels-compiled.jsonl" $kernels ;;
    9) FASTMIM_BENCH_COMPILE=${FASTMIM_BENCH_COMPILE:-max-autotune} run bench/bench_step.py --json "$out/steps-max-autotune.jsonl" --methods mae \
        --providers ours graph stock $base ;;
    10) run bench/bench_e2e.py --json "$out/e2e.jsonl" $e2e $trained ;;
    # Loaders on the CPU: DALI and nvImageCodec would take the GPU.
    11) CUDA_VISIBLE_DEVICES= run bench/bench_loader.py --json "$out/loaders.jsonl" $loader ;;
    12) most --methods mae cmae $batches ;;
    13) steps --providers ours graph blocks fp8 fp8-blocks --methods mae $large ;;
    esac
    $python bench/report.py "$out"/*.jsonl || failed=1
    return $failed
}

main 2>&1 | tee -a "$log"
exit "${PIPESTATUS[0]}"
