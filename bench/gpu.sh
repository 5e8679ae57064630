#!/usr/bin/env bash
# Everything that a machine with a GPU can tell, most telling first; no network, with the torch and triton that are there.
#
#   bench/gpu.sh OUT                 the parts below, in this order, until TOTAL_SECONDS (default 570) are over
#   bench/gpu.sh OUT build tune      some parts
#
#   TOTAL_SECONDS=200                the whole call's time; each part ends before that, and leaves what it has
#   PART_SECONDS=300                 every part's time, in place of its own share
#   EARLIER=results.tgz              where OUT has none: what a call on another machine left, the archive or its files
#   COMMIT=abc1234                   what the results say they are of, where there is no git: `git rev-parse --short HEAD`
#   PYTHON=python3.12  JOBS=8        the interpreter; processes for what Triton's compiler, not the GPU, takes its time for
#
# OUT gets results.tgz, which holds every log and result, and copies of the few that are read first; each after every part.
# The same command goes on where it stopped: what is measured, and what was right, is not done again, and what took its
# process with it comes last. A part that fails does not stop the next. Without a GPU the same path runs on small shapes,
# of the tests the first file: `make test-interpreter` has them all.
set -uo pipefail
cd "$(dirname "$0")/.."

# shares of 570 s in which one call gets from build to matrix, and a second of 300 s through tune
declare -A SHARE=([build]=120 [first]=110 [tests]=150 [matrix]=170 [tune]=150 [check]=150 [report]=60)
PARTS="env build first tests matrix report tune check sanitizer drop_in task_bank templates profile compile report"
LEAST=10  # seconds, below which no part is begun
FIRST_READ="env.txt parts.txt checks.journal matrix.jsonl compile.jsonl tune.json report/operators.md"

PYTHON=${PYTHON:-python3}
TOTAL_SECONDS=${TOTAL_SECONDS:-570}
JOBS=${JOBS:-$(($(nproc) > 16 ? 8 : ($(nproc) + 1) / 2))}
OUT=$(mkdir -p "${1:?usage: bench/gpu.sh OUT [part...]}" && cd "$1" && pwd)
shift
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null)}
export COMMIT
HAS_GPU=$($PYTHON -c 'import torch; print(int(torch.cuda.is_available()))')
if [ "$HAS_GPU" = 1 ]; then
  SMALL="" QUICK="" INTERPRET=0 LIMIT="--limit 120"  # a kernel that hangs takes no more of the time than that
else
  SMALL=--small QUICK=--quick INTERPRET=1 LIMIT=""  # the kernels run in Triton's interpreter
  export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
fi

WORK=$(mktemp -d)
[ -s "$OUT/results.tgz" ] && EARLIER=$OUT/results.tgz
EARLIER=${EARLIER:-none}
if [ -d "$EARLIER" ]; then
  cp -r "$EARLIER/." "$WORK"
elif [ -s "$EARLIER" ]; then
  tar -xzf "$EARLIER" -C "$WORK"
fi

keep() {  # what there is, in OUT, in one step: a call that is killed leaves the last whole archive
  tar -czf "$OUT/.results" -C "$WORK" . && mv "$OUT/.results" "$OUT/results.tgz"
  (cd "$WORK" && for file in $FIRST_READ; do [ -s "$file" ] && cp "$file" "$OUT"; done)
}
trap 'keep; rm -rf "$WORK"' EXIT

left() {  # left SHARE: seconds that a part of that share may take
  local whole=$((TOTAL_SECONDS - SECONDS)) share=${PART_SECONDS:-$1}
  echo $((share < whole ? share : whole))
}

part() {  # part NAME SHARE COMMAND...: its output, exit status and seconds; BUDGET stands for the seconds to begin work in
  local name=$1 seconds started=$SECONDS end status tries=0
  seconds=$(left "$2")
  shift 2
  if [ "$seconds" -lt "$LEAST" ]; then
    echo "== $name: left out, the time is spent"
    return 1
  fi
  end=$((SECONDS + seconds))
  echo "== $name: $*" | tee -a "$WORK/$name.log"
  date "+== %F %T, commit $COMMIT, $seconds s" >>"$WORK/$name.log"
  while :; do
    seconds=$((end - SECONDS)) tries=$((tries + 1))  # begun within four fifths, a piece may still take its time
    timeout --signal=INT --kill-after=10 "$seconds" "${@/#BUDGET/$((seconds * 4 / 5))}" >>"$WORK/$name.log" 2>&1
    status=$?
    case $status in  # 75: a piece took its process with it; 134, 139: it aborted, or wrote where it must not
      75 | 134 | 139) [ "$tries" -lt 20 ] && [ $((end - SECONDS)) -gt "$LEAST" ] || break ;;
      *) break ;;
    esac
  done
  tail -n 3 "$WORK/$name.log"
  echo "$name status=$status seconds=$((SECONDS - started)) processes=$tries" | tee -a "$WORK/parts.txt"
  keep
  return "$status"
}
once() {  # a part that does not resume by itself: left out where it has succeeded
  grep -q "^$1 status=0" "$WORK/parts.txt" 2>/dev/null || part "$@"
}

env_() {
  echo "commit $COMMIT"
  $PYTHON -c 'import sys, torch; print(sys.version); print(torch.__version__, torch.version.cuda)'
  $PYTHON -m pip list 2>/dev/null | grep -i -E '^(torch|triton|numpy|transformers|peft|pytest|pytest-xdist|hypothesis) '
  command -v nvidia-smi >/dev/null && nvidia-smi
  command -v nvcc >/dev/null && nvcc --version
  $PYTHON -m peft_ops.info
}

build() {  # for the GPU that is here, unless told otherwise: a quarter of the compiler's time
  local here
  here=$($PYTHON -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))' 2>/dev/null)
  case $here in 9.* | 1?.*) here+=a ;; esac
  [ -n "$here" ] && export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$here}
  part build "${SHARE[build]}" $PYTHON setup.py --quiet build_ext --inplace
}

check() {  # check NAME SHARE OPTION...: of one list, what earlier calls have not found right
  TRITON_INTERPRET=$INTERPRET part "$1" "$2" $PYTHON -m bench.gpu_check $SMALL --done "$WORK/checks.journal" --budget BUDGET \
    --jobs "$JOBS" $LIMIT "${@:3}"
}

tests() {  # kernels first; without PEFT or transformers, without the files that need them. Status 5: none was left
  local missing files without marks="not nightly" parallel=()
  missing=$($PYTHON -c 'from importlib.util import find_spec
print(*[name for name in ("peft", "transformers", "safetensors", "hypothesis") if not find_spec(name)], sep="|")')
  case $missing in *peft* | *transformers*) missing+='|tests\.tiny' ;; esac  # which imports both
  files=$(grep -l 'mark\.kernels' tests/test_*.py; grep -L 'mark\.kernels' tests/test_*.py)
  without=$(grep -l -E "^(import|from) (${missing:-no module at all})( |\.|$)" $files)
  if [ -n "$without" ]; then
    echo "left out, without $missing:" $without
    files=$(grep -v -x -F "$without" <<<"$files")
  fi
  if [ "$HAS_GPU" != 1 ]; then
    files=${files%%$'\n'*} marks="kernels and not nightly"
  elif $PYTHON -c 'import xdist' 2>/dev/null; then
    parallel=(-n "$(($(nproc) > 2 ? $(nproc) - 2 : 1))")
  fi
  TRITON_INTERPRET=$INTERPRET OMP_NUM_THREADS=1 part tests "${SHARE[tests]}" $PYTHON -m pytest -q -p no:cacheprovider \
    -p bench.resume --journal "$WORK/tests.journal" $LIMIT -m "$marks" "${parallel[@]}" $files
}

sanitizer() {  # a tool's checks count once it has ended without a finding
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer here"; return 0; }
  local tool tools="memcheck racecheck initcheck" count=3 caching
  for tool in $tools; do
    cp "$WORK/$tool.txt" "$WORK/$tool.trial" 2>/dev/null || : >"$WORK/$tool.trial"
    caching=1  # PyTorch's allocator would hide an access behind a tensor's end; a race is none of its business
    [ "$tool" = racecheck ] && caching=
    PYTORCH_NO_CUDA_MEMORY_CACHING=$caching part "sanitizer-$tool" $((($(left 9999) - LEAST) / count)) compute-sanitizer \
      --tool "$tool" --error-exitcode 9 $PYTHON -m bench.gpu_check --small --done "$WORK/$tool.trial" --budget BUDGET &&
      mv "$WORK/$tool.trial" "$WORK/$tool.txt"
    count=$((count - 1))
  done
}

profile() {
  command -v ncu >/dev/null || { echo "no ncu here"; return 0; }
  # the clocks stay as they are: a tool that measures changes no setting
  once profile 120 ncu --clock-control none --set basic --kernel-name-base function -k 'regex:ia3|dual|prompt' -c 60 \
    $PYTHON -m bench.matrix "$WORK/ncu.jsonl" --budget 60
}

report() {  # tables and plots of what there is by now
  [ -s "$WORK/matrix.jsonl" ] || [ -s "$WORK/compile.jsonl" ] || { echo "nothing to report yet"; return 0; }
  part report "${SHARE[report]}" $PYTHON -m bench.report "$WORK" --out "$WORK/report"
}

resumed() {  # resumed NAME COMMAND...: a benchmark that keeps its pieces in NAME.json
  part "$1" 200 $PYTHON -m "${@:2}" --json "$WORK/$1.json" --budget BUDGET
}

run() {
  case $1 in
    env) env_ >"$WORK/env.txt" 2>&1; tail -n 5 "$WORK/env.txt" ;;
    build) build ;;
    first) check first "${SHARE[first]}" --first ;;
    check) check check "${SHARE[check]}" ;;
    matrix) part matrix "${SHARE[matrix]}" $PYTHON -m bench.matrix "$WORK/matrix.jsonl" --budget BUDGET $LIMIT $QUICK ;;
    drop_in) resumed drop_in bench.drop_in --resume $QUICK ;;
    tests) tests ;;
    sanitizer) sanitizer ;;
    profile) profile ;;
    tune) if [ "$HAS_GPU" = 1 ]; then resumed tune bench.tune; else part tune 60 $PYTHON -m bench.tune --dry-run; fi ;;
    task_bank) resumed task_bank bench.task_bank --resume $QUICK ;;
    templates) once templates 300 $PYTHON -m peft_ops.demo.templates --out "$WORK" ${QUICK:+--steps 3 --lm-steps 3} ;;
    compile) part compile 400 $PYTHON -m bench.matrix "$WORK/compile.jsonl" --compile --budget BUDGET $QUICK ;;
    report) report ;;
    *) echo "no part named $1; there are: $PARTS"; exit 2 ;;
  esac
}

for name in ${*:-$PARTS}; do
  run "$name"
done
