#!/usr/bin/env bash
# Everything that a machine with a GPU can tell, most telling first; no network, with the torch and triton that are there.
#
#   bench/gpu.sh OUT                 every part below, into the folder OUT
#   bench/gpu.sh OUT build check     some parts
#   PYTHON=python3.12 PART_SECONDS=300 bench/gpu.sh OUT
#
# A part ends after PART_SECONDS (default 540) and leaves what it has: benchmarks go on where they stopped, when the same
# OUT is given again. A part that fails does not stop the next. Without a GPU the same path runs on small shapes.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
PART_SECONDS=${PART_SECONDS:-540}
OUT=$(mkdir -p "${1:?usage: bench/gpu.sh OUT [part...]}" && cd "$1" && pwd)
shift
PARTS="env build check matrix tests sanitizer tune profile compile report"
HAS_GPU=$($PYTHON -c 'import torch; print(int(torch.cuda.is_available()))')
if [ "$HAS_GPU" = 1 ]; then
  SMALL="" QUICK="" INTERPRET=0
else
  SMALL=--small QUICK=--quick INTERPRET=1  # the kernels run in Triton's interpreter
fi

part() {  # part NAME COMMAND...: its output, exit status and seconds go to OUT
  local name=$1 started=$SECONDS status
  shift
  echo "== $name: $*"
  timeout --signal=INT --kill-after=20 "$PART_SECONDS" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  tail -n 3 "$OUT/$name.log"
  echo "$name status=$status seconds=$((SECONDS - started))" | tee -a "$OUT/parts.txt"
}

env_() {
  git rev-parse HEAD
  $PYTHON -c 'import sys, torch; print(sys.version); print(torch.__version__, torch.version.cuda)'
  $PYTHON -m pip list 2>/dev/null | grep -i -E '^(torch|triton|numpy|transformers|peft|pytest|hypothesis) '
  command -v nvidia-smi >/dev/null && nvidia-smi
  command -v nvcc >/dev/null && nvcc --version
  $PYTHON -m peft_ops.info
}

sanitizer() {
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer here"; return 0; }
  for tool in memcheck racecheck initcheck; do
    part "sanitizer-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 $PYTHON -m bench.gpu_check --small
  done
}

profile() {
  command -v ncu >/dev/null || { echo "no ncu here"; return 0; }
  part profile ncu --set basic --kernel-name-base function -k 'regex:ia3|dual' -c 40 $PYTHON -m bench.matrix "$OUT/ncu.jsonl" --budget 60
}

report() {  # tables and plots of what there is by now
  for name in matrix compile; do
    if [ -s "$OUT/$name.jsonl" ]; then
      part "report-$name" $PYTHON -m bench.report "$OUT/$name.jsonl" --out "$OUT/report/$name"
    fi
  done
}

run() {
  case $1 in
    env) env_ >"$OUT/env.txt" 2>&1; tail -n 5 "$OUT/env.txt" ;;
    build) part build $PYTHON setup.py --quiet build_ext --inplace ;;
    check) TRITON_INTERPRET=$INTERPRET part check $PYTHON -m bench.gpu_check $SMALL ;;
    matrix) part matrix $PYTHON -m bench.matrix "$OUT/matrix.jsonl" --budget "$((PART_SECONDS - 60))" $QUICK ;;
    tests) part tests $PYTHON -m pytest -q -x --maxfail=50 -p no:cacheprovider -m "kernels and not nightly" --ignore=tests/compile tests ;;
    sanitizer) sanitizer ;;
    profile) profile ;;
    tune)
      if [ "$HAS_GPU" = 1 ]; then part tune $PYTHON -m bench.tune; else part tune $PYTHON -m bench.tune --dry-run; fi ;;
    compile) part compile $PYTHON -m bench.matrix "$OUT/compile.jsonl" --compile --budget "$((PART_SECONDS - 120))" $QUICK ;;
    report) report ;;
    *) echo "no part named $1; there are: $PARTS"; exit 2 ;;
  esac
}

for name in ${*:-$PARTS}; do
  run "$name"
done
