#!/usr/bin/env bash
# Everything that needs a GPU, on a machine without a network: builds, tests, measures; within nine minutes.
#
#   benchmarks/gpu.sh OUT [PART...]     parts: build tests sanitize kernels compare-N slope-N waves-N gates triton
#
# N is a batch size. Without parts: all of them, compare and slope at 1 and 128, compare-1024 and waves-1024. Logs and
# JSON go to OUT, a short table comes last. A part that runs out of time keeps what it has written.
#
# Needs Python with torch (CUDA), numpy, Pillow, pytest, pytest-benchmark, pybind11, setuptools and nvcc; not safetensors,
# typer or rich. DTYPE (float16) and ARCH (cifar10_rnn_gate_110) say what is measured.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?usage: benchmarks/gpu.sh OUT [PART...]}" && cd "$1" && pwd)
shift
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(build tests compare-1 compare-128 slope-1 slope-128 gates
                                  waves-1 waves-1024 sanitize kernels compare-1024 triton)
deadline=$((SECONDS + 520))
failed=()
measure=(python benchmarks/gpu.py --dtype "${DTYPE:-float16}" --arch "${ARCH:-cifar10_rnn_gate_110}" --output "$out")

# limited SECONDS LOG COMMAND...: with what is left of the nine minutes, at most so many seconds.
limited() {
    local most=$1 log=$2 left=$((deadline - SECONDS))
    shift 2
    [ "$left" -gt 5 ] || { echo "not run: no time left" >"$out/$log.log"; return 1; }
    timeout --kill-after=5 $((most < left ? most : left)) "$@" >"$out/$log.log" 2>&1
}

build() { limited 180 build pip install --no-build-isolation --no-deps --force-reinstall .; }

# The conformance suite on the GPU, and every test that is marked as needing one.
tests() {
    local files
    files=$(grep -lE 'mark\.gpu|engine_devices' tests/test_*.py)
    # shellcheck disable=SC2086
    limited 150 tests pytest -q -k "(cuda or gpu) and not eager-cuda" --junitxml="$out/tests.xml" $files
}

triton() {
    limited 100 triton pytest -q benchmarks/bench_triton.py --benchmark-enable --benchmark-json="$out/triton.json"
}

sanitize() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not installed" | tee "$out/sanitize.log"
        return 1
    fi
    local tool status=0 only
    for tool in memcheck racecheck synccheck initcheck; do
        only=(--kernel-name kns=skipnet)
        [ $tool != initcheck ] || only=()  # it has to see who else writes
        limited 40 "sanitize-$tool" compute-sanitizer --tool $tool --report-api-errors no --error-exitcode 9 "${only[@]}" \
            python benchmarks/gpu.py touch --batch 3 --dtype "${DTYPE:-float16}" || { status=1; echo "  $tool failed"; }
    done
    return $status
}

missing=$(python - <<'PYTHON'
import importlib.util
print(*(name for name in ("torch", "numpy", "PIL", "pytest", "pytest_benchmark", "pybind11", "setuptools")
        if importlib.util.find_spec(name) is None))
PYTHON
)
[ -z "$missing" ] || { echo "not installed: $missing"; exit 1; }
{ nvidia-smi; nvcc --version; python -c 'import torch; print("torch", torch.__version__)'; pip list; } >"$out/machine.log" 2>&1

for part in "${parts[@]}"; do
    started=$SECONDS
    case $part in
        build | tests | triton | sanitize) "$part" ;;
        compare-*) limited 110 "$part" "${measure[@]}" compare --batch "${part#*-}" --seconds 3 ;;
        slope-* | waves-*) limited 40 "$part" "${measure[@]}" "${part%-*}" --batch "${part#*-}" --seconds 3 ;;
        gates | kernels) limited 40 "$part" "${measure[@]}" "$part" --seconds 2 ;;
        *) echo "no part is called $part" && false ;;
    esac && word=done || { word=FAILED; failed+=("$part"); }
    echo "$part: $word, $((SECONDS - started)) s"
done

grep -hE '^[0-9]+ (passed|failed)|passed|failed' "$out/tests.log" 2>/dev/null | tail -1
python benchmarks/gpu.py table "$out"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}; see $out/*.log"; exit 1; }
