#!/usr/bin/env bash
# Everything that a machine with a GPU can tell, most telling first; no network, with the torch and triton that are there.
#
#   bench/gpu.sh OUT                 every part below, into the folder OUT
#   bench/gpu.sh OUT build check     some parts
#   PYTHON=python3.12 PART_SECONDS=300 bench/gpu.sh OUT
#
# A part ends after PART_SECONDS (default 540) and leaves what it has. The same command goes on where it stopped: what is
# measured, and what was right, is not done again. A part that fails does not stop the next. Without a GPU the same path
# runs on small shapes, of the tests the first file: `make test-interpreter` has them all.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
PART_SECONDS=${PART_SECONDS:-540}
BUDGET=$((PART_SECONDS * 8 / 10))  # begun before, a shape may still take its time
OUT=$(mkdir -p "${1:?usage: bench/gpu.sh OUT [part...]}" && cd "$1" && pwd)
shift
PARTS="env build check matrix drop_in tests sanitizer tune task_bank templates profile compile report"
HAS_GPU=$($PYTHON -c 'import torch; print(int(torch.cuda.is_available()))')
if [ "$HAS_GPU" = 1 ]; then
  SMALL="" QUICK="" INTERPRET=0
else
  SMALL=--small QUICK=--quick INTERPRET=1  # the kernels run in Triton's interpreter
  export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
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

once() {  # a part that does not resume by itself: left out where it has succeeded
  grep -q "^$1 status=0" "$OUT/parts.txt" 2>/dev/null || part "$@"
}

env_() {
  git rev-parse HEAD
  $PYTHON -c 'import sys, torch; print(sys.version); print(torch.__version__, torch.version.cuda)'
  $PYTHON -m pip list 2>/dev/null | grep -i -E '^(torch|triton|numpy|transformers|peft|pytest|hypothesis) '
  command -v nvidia-smi >/dev/null && nvidia-smi
  command -v nvcc >/dev/null && nvcc --version
  $PYTHON -m peft_ops.info
}

tests() {  # a file at a time, so that the next run goes on with the next file
  local file end=$((SECONDS + PART_SECONDS))
  for file in $(grep -l 'mark\.kernels' tests/test_*.py); do
    [ "$SECONDS" -lt "$end" ] || { echo "left out, the time is spent: $file and what follows"; return; }
    TRITON_INTERPRET=$INTERPRET once "$(basename "$file" .py)" \
      $PYTHON -m pytest -q --maxfail=50 -p no:cacheprovider -m "kernels and not nightly" "$file"
    [ "$HAS_GPU" = 1 ] || return 0
  done
}

sanitizer() {
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer here"; return 0; }
  for tool in memcheck racecheck initcheck; do
    part "sanitizer-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 $PYTHON -m bench.gpu_check --small \
      --done "$OUT/$tool.txt" --budget "$BUDGET"
  done
}

profile() {
  command -v ncu >/dev/null || { echo "no ncu here"; return 0; }
  once profile ncu --set basic --kernel-name-base function -k 'regex:ia3|dual|prompt' -c 60 $PYTHON -m bench.matrix "$OUT/ncu.jsonl" --budget 60
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
    check) TRITON_INTERPRET=$INTERPRET part check $PYTHON -m bench.gpu_check $SMALL --done "$OUT/right.txt" --budget "$BUDGET" ;;
    matrix) part matrix $PYTHON -m bench.matrix "$OUT/matrix.jsonl" --budget "$BUDGET" $QUICK ;;
    drop_in) part drop_in $PYTHON -m bench.drop_in --json "$OUT/drop_in.json" --resume --budget "$BUDGET" $QUICK ;;
    tests) tests ;;
    sanitizer) sanitizer ;;
    profile) profile ;;
    tune)
      if [ "$HAS_GPU" = 1 ]; then
        part tune $PYTHON -m bench.tune --json "$OUT/tune.json" --budget "$BUDGET"
      else
        part tune $PYTHON -m bench.tune --dry-run
      fi ;;
    task_bank) part task_bank $PYTHON -m bench.task_bank --json "$OUT/task_bank.json" --resume --budget "$BUDGET" $QUICK ;;
    templates) once templates $PYTHON -m peft_ops.demo.templates --out "$OUT" ${QUICK:+--steps 3 --lm-steps 3} ;;
    compile) part compile $PYTHON -m bench.matrix "$OUT/compile.jsonl" --compile --budget "$BUDGET" $QUICK ;;
    report) report ;;
    *) echo "no part named $1; there are: $PARTS"; exit 2 ;;
  esac
}

for name in ${*:-$PARTS}; do
  run "$name"
done
