#!/usr/bin/env bash
# One command for a machine with a GPU and without a network: build, tests on CUDA, benchmarks. Results go to OUT (default: results/gpu).
#   scripts/gpu_check.sh [--part build|tests|sanitize|bench] ...      default: build, tests and bench
# Uses the python3 on PATH, whose torch, triton, transformers and pytest are already installed. Changes no clocks or settings.
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
[ ${#PARTS[@]} -gt 0 ] || PARTS=(build tests bench)
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
failed=()

step() { # step NAME SECONDS COMMAND...: the log goes to OUT/NAME.log, its end to the terminal
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  if timeout "$seconds" "$@" >"$OUT/$name.log" 2>&1; then echo "ok   $name, $((SECONDS - start)) s"; else failed+=("$name"); echo "FAIL $name (exit $?), $((SECONDS - start)) s"; fi
  tail -n 12 "$OUT/$name.log"
}

for part in "${PARTS[@]}"; do
  case $part in
    build) step build 240 python3 setup.py build_ext --inplace ;;
    tests) step tests 240 python3 -m pytest tests/test_kernel_report.py tests/ops tests/pid tests/dept tests/pasta tests/dect tests/ytuning --device cuda -n 8 --dist loadfile -p no:cacheprovider ;;
    sanitize) step sanitize 540 compute-sanitizer --tool memcheck --error-exitcode 1 python3 -m pytest tests/ops/test_shared_cross_attention_triton.py tests/ops/test_decomposed_prompt_embedding_cuda.py tests/ops/test_special_tokens_cuda.py tests/ops/test_add_layer_norm_inject_cuda.py --device cuda -x -p no:cacheprovider ;;
    bench)
      step pid_attention 120 python3 benchmarks/pid_attention.py --device cuda --dtype float32 bfloat16 --out "$OUT/pid_attention.json"
      step pid_generate 120 python3 benchmarks/pid_generate.py --device cuda --dtype float32 bfloat16 --repeats 5 --out "$OUT/pid_generate.json"
      step dept_embedding 120 python3 benchmarks/dept_embedding.py --device cuda --dtype float32 bfloat16 --out "$OUT/dept_embedding.json"
      step pasta_norm 120 python3 benchmarks/pasta_norm.py --device cuda --dtype float32 bfloat16 --out "$OUT/pasta_norm.json"
      step pasta_layer 120 python3 benchmarks/pasta_layer.py --device cuda --model base large --dtype float32 bfloat16 --repeats 10 --out "$OUT/pasta_layer.json"
      step label_attention 60 python3 benchmarks/label_attention.py --device cuda --dtype float32 bfloat16 --out "$OUT/label_attention.json"
      step label_logits 60 python3 benchmarks/label_logits.py --device cuda --out "$OUT/label_logits.json" ;;
    *) echo "gpu_check.sh: no part named $part" >&2; exit 2 ;;
  esac
done
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >"$OUT/gpu.txt" 2>&1
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
