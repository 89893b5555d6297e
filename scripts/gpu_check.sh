#!/usr/bin/env bash
# Checks and measurements on a machine with a GPU and without a network, in three calls of at most 10 minutes:
#   scripts/gpu_check.sh A   right: build, every kernel, the operators' tests, the methods from end to end
#   scripts/gpu_check.sh B   safe and measured: sanitizers over every kernel; bench, as CUDA graphs and eager
#   scripts/gpu_check.sh C   end to end: generation, profiles of the five methods, tuned configs
#   --dry-run                the same steps on a CPU, in a small form: the script itself is tested so
# Writes OUT/gpu_check_PART.tar.gz (default OUT: results): the log of every step, JSON as it is measured, and
# steps.jsonl. The last lines printed are one for each step. Uses the python3 on PATH (or PYTHON) with torch, triton,
# transformers, peft, pytest and pytest-xdist installed. Libraries that are built already are used if they load.
# Changes no clocks or settings of the GPU. Measurements to keep belong in benchmarks/results/<device>/.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} part="" dry=false
for argument in "$@"; do
  case $argument in
    A | B | C) part=$argument ;;
    --dry-run) dry=true ;;
    *) echo "gpu_check.sh: expected A, B or C, and --dry-run; got $argument" >&2; exit 2 ;;
  esac
done
[ -n "$part" ] || { echo "gpu_check.sh: name a part, A, B or C" >&2; exit 2; }
out=${OUT:-results}
logs=$out/gpu_check_$part
rm -rf "$logs" && mkdir -p "$logs"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
device=cuda
if $dry; then device=cpu; fi
failed=0

# step NAME SECONDS COMMAND...: the log goes to a file. An interrupted benchmark writes its results so far.
step() {
  local name=$1 seconds=$2 start=$SECONDS status
  shift 2
  timeout --signal=INT --kill-after=10 "$seconds" "$@" >"$logs/$name.log" 2>&1
  status=$?
  [ $status -eq 0 ] || failed=$((failed + 1))
  printf '{"step": "%s", "status": %d, "seconds": %d}\n' "$name" $status $((SECONDS - start)) >>"$logs/steps.jsonl"
  tail -n 8 "$logs/$name.log"
  echo "== $name: exit $status after $((SECONDS - start)) s"
}
on_gpu_or_dry() { if $dry; then echo "$2"; else echo "$1"; fi; }
bench() { step "$1" "$2" "$python" -m peft_kernels bench "${@:3}" --device $device --out "$logs/$1"; }
benchmark() { step "$1" "$2" "$python" "benchmarks/$1.py" --device $device --out "$logs/$1.json" "${@:3}"; }
profile() { step "profile_$1" "$2" "$python" -m peft_kernels profile "${@:3}" --device $device --out "$logs/profile_$1"; }
# Without torch's memory pool memcheck knows the bounds of every tensor. Kernels of torch are not instrumented.
sanitize() {
  local tool=$1 kernels=() name
  for name in shared_cross_attention embedding special_token layer_norm label_ prototype_; do
    kernels+=(--kernel-name "kernel_substring=$name")
  done
  local command=(compute-sanitizer --tool "$tool" --error-exitcode 1 "${kernels[@]}")
  if $dry; then command=(env); fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 80 "${command[@]}" \
    "$python" scripts/every_kernel.py --device $device $(on_gpu_or_dry "" special_token_add)
}

case $part in
  A)
    loads='from peft_kernels.ops import cuda_library as cuda; error = cuda.load_error()'
    $dry || loads='from peft_kernels.ops import cuda_library as cuda; error = cuda.error()'
    loads+='; print(error or "both libraries load"); raise SystemExit(bool(error))'
    "$python" -c "$loads" >/dev/null 2>&1 ||
      PEFT_KERNELS_BUILD=require step build 150 "$python" setup.py build_ext --inplace
    step libraries 60 "$python" -c "$loads"
    step info 60 "$python" -m peft_kernels info
    step every_kernel 150 "$python" scripts/every_kernel.py --device $device $(on_gpu_or_dry "" special_token_add)
    step operators 170 "$python" -m pytest $(on_gpu_or_dry "tests/ops -n 8 --dist loadfile" tests/ops/test_special_tokens.py) \
      --device $device -m "not large_memory" --maxfail 20 -p no:cacheprovider
    step large_memory 60 "$python" -m pytest $(on_gpu_or_dry tests/ops "tests/ops/test_label_logits.py") \
      --device $device -m large_memory -p no:cacheprovider
    step methods 170 "$python" -m pytest tests/workflows/on_device.py --device $device -p no:cacheprovider \
      $(on_gpu_or_dry "-n 4" "-k PASTA") ;;
  B)
    step warm_cache 120 "$python" scripts/every_kernel.py --device $device $(on_gpu_or_dry "" special_token_add)
    for tool in memcheck racecheck synccheck initcheck; do sanitize $tool; done
    bench bench 110 $(on_gpu_or_dry "shared_cross_attention decomposed_prompt_embedding --dtype bfloat16" \
      "label_logits --quick --repeats 2") ;;
  C)
    benchmark pid_generate 200 $(on_gpu_or_dry "--dtype bfloat16 --repeats 8" --quick)
    if $dry; then
      profile pid 60 t5-base --quick
    else
      profile pid 70 t5-base --dtype bfloat16 --streams 1,8,30 --length 512
      for method in dept pasta ytuning; do profile $method 45 bert-base --method $method --train --dtype bfloat16; done
      profile dect 45 roberta-base --method dect --dtype bfloat16
      step tune 100 "$python" -m peft_kernels tune shared_cross_attention --dtype bfloat16 --out "$logs/tuned.json"
    fi ;;
esac

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >"$logs/gpu.txt" 2>&1 || true
tar -C "$out" -czf "$logs.tar.gz" "gpu_check_$part"
echo "-- $logs.tar.gz"
while read -r line; do
  name=$(sed 's/.*"step": "\([a-z_]*\)".*/\1/' <<<"$line")
  echo "$line $(grep -v '^\s*$' "$logs/$name.log" | tail -n 1 | cut -c1-120)"
done <"$logs/steps.jsonl"
exit $((failed > 0))
