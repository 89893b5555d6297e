#!/usr/bin/env bash
# One command for a machine with a GPU and without a network: build, tests on CUDA, sanitizer, benchmarks, profiles.
#   scripts/gpu_check.sh                   all parts in a quick form, within 9 minutes
#   scripts/gpu_check.sh --part NAME ...   build, tests, sanitize, bench or profile in full, each within 9 minutes
# Results go to OUT (default: results/gpu): JSON, and a log for each step. Measurements to keep belong in benchmarks/results/<device>/.
# Uses the python3 on PATH, whose torch, triton, transformers, peft and pytest are already installed. Changes no clocks or settings.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-results/gpu}
PARTS=()
while [ $# -gt 0 ]; do
  case $1 in
    --part) PARTS+=("${2:?--part needs a name}"); shift 2 ;;
    *) echo "gpu_check.sh: unknown argument $1" >&2; exit 2 ;;
  esac
done
full=true
[ ${#PARTS[@]} -gt 0 ] || { full=false; PARTS=(build tests sanitize bench profile); }
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
failed=()

step() { # step NAME SECONDS COMMAND...: the log goes to OUT/NAME.log, its end to the terminal. An interrupted benchmark writes its results so far.
  local name=$1 seconds=$2 start=$SECONDS status
  shift 2
  timeout --signal=INT --kill-after=10 "$seconds" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  if [ $status -eq 0 ]; then echo "ok   $name, $((SECONDS - start)) s"; else failed+=("$name"); echo "FAIL $name (exit $status), $((SECONDS - start)) s"; fi
  tail -n 12 "$OUT/$name.log"
}
pick() { if $full; then echo "$2"; else echo "$1"; fi; }
peft_kernels() { step "$1" "$2" python3 -m peft_kernels "${@:3}" --device cuda --out "$OUT"; }
benchmark() { step "$1" "$2" python3 "benchmarks/$1.py" --device cuda --dtype bfloat16 --out "$OUT/$1.json"; }
sanitize() { # without torch's memory pool memcheck sees the bounds of every tensor
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$1" "$2" compute-sanitizer --tool "$1" --error-exitcode 1 python3 scripts/every_kernel.py --device cuda
}

for part in "${PARTS[@]}"; do
  case $part in
    build) step build 120 python3 setup.py build_ext --inplace ;;
    tests) step tests "$(pick 150 530)" python3 -m pytest tests/ops tests/pid tests/dept tests/pasta tests/dect tests/ytuning --device cuda -n 8 --dist loadfile -p no:cacheprovider ;;
    sanitize)
      sanitize memcheck "$(pick 70 270)"
      if $full; then sanitize racecheck 260; fi ;;
    bench)
      if $full; then
        peft_kernels bench 350 bench
        for name in pid_generate pasta_layer dept_training dect ytuning_step; do benchmark $name 35; done
      else
        peft_kernels bench 120 bench --quick --dtype bfloat16
      fi ;;
    profile)
      if $full; then
        peft_kernels profile_pid 150 profile t5-base --dtype bfloat16 --streams 1,8,30 --length 512
        for method in dept pasta ytuning; do peft_kernels "profile_$method" 90 profile bert-base --method $method --train --dtype bfloat16; done
        peft_kernels profile_dect 90 profile roberta-base --method dect --dtype bfloat16
      else
        peft_kernels profile 60 profile t5-base --quick --dtype bfloat16
      fi ;;
    *) echo "gpu_check.sh: no part named $part" >&2; exit 2 ;;
  esac
done
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >"$OUT/gpu.txt" 2>&1
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
