#!/usr/bin/env bash
# Everything that needs a GPU, on a machine without a network: builds, tests, measures; within LIMIT (520) seconds.
#
#   benchmarks/gpu.sh OUT build ceiling-1    dense engines first, each batch size in a call and a time of its own
#   benchmarks/gpu.sh OUT [PART...]
#
# Parts: build tests tests-triton sanitize kernels ceiling-N compare-N routing-N slope-N crossover waves-N gates triton,
# where N is a batch size. Without any: all but the ceilings, which compile for minutes; compare and slope at 1 and 128,
# routing at 1, compare-1024 and waves-1024, as far as the time reaches. Logs and JSON go to the folder OUT, and all of
# them to the archive OUT.tar.gz; a short table comes last. compare-N goes by what ceiling-N has left in OUT; the table
# says what is lacking there. A part that runs out of time keeps what it has written.
#
# Needs Python 3.11 or later with torch (CUDA), numpy, Pillow, pytest, pytest-benchmark, pybind11, setuptools, and nvcc; not
# safetensors, typer or rich. With pytest-xdist the tests take a fraction of the time: most of it is compilation.
# DTYPE (float16) and ARCH (cifar10_rnn_gate_110) say what is measured.
set -uo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/local/cuda/bin
out=$(mkdir -p "${1:?usage: benchmarks/gpu.sh OUT [PART...]}" && cd "$1" && pwd) || exit
shift
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(build tests compare-1 compare-128 routing-1 slope-1 slope-128 crossover gates waves-1
                                  waves-1024 kernels tests-triton sanitize compare-1024 triton)
deadline=$((SECONDS + ${LIMIT:-520}))
failed=()
pytest=(python3 -P -m pytest -q -rs -p no:cacheprovider)  # -P: the installed package, not the source tree
measure=(python3 benchmarks/gpu.py --dtype "${DTYPE:-float16}" --arch "${ARCH:-cifar10_rnn_gate_110}" --output "$out")

# limited SECONDS LOG COMMAND...: with what is left of the time, at most so many seconds. A command that is interrupted
# writes what it has.
limited() {
    local log=$out/$2.log left=$((deadline - SECONDS)) status=0
    local most=$(($1 < left ? $1 : left))
    shift 2
    [ "$left" -gt 5 ] || { echo "not run: no time left" >"$log"; return 1; }
    timeout --signal=INT --kill-after=10 "$most" "$@" >"$log" 2>&1 || status=$?
    case $status in 124 | 137) echo "stopped after $most s" >>"$log" ;; esac
    return $status
}

build() { limited 180 build python3 -m pip install --no-build-isolation --no-deps --force-reinstall .; }

# tests PART EXPRESSION: the conformance suite on the GPU, and every other test that runs there. By name: pytest refuses a
# path that is not there.
tests() {
    local workers=() paths=(tests/conformance/test_promises.py tests/gpu tests/unit/test_ops.py
                            tests/triton/test_{kernels,tf32,tuning}.py)
    if python3 -c 'import xdist' 2>/dev/null; then workers=(-n $(($(nproc) / 2))); fi
    OMP_NUM_THREADS=2 limited 150 "$1" "${pytest[@]}" "${workers[@]}" --continue-on-collection-errors -k "$2" \
        --junitxml="$out/$1.xml" "${paths[@]}"
}

# ceiling PART: with cudnn.benchmark and without, in processes of their own, each of which takes half of the time.
ceiling() {
    local command=("${measure[@]}" ceiling --batch "${1#*-}" --seconds 3) status=0
    limited $(((deadline - SECONDS) / 2)) "$1-cudnn.benchmark" "${command[@]}" --cudnn-benchmark || status=1
    echo "  with cudnn.benchmark: $(tail -n 1 "$out/$1-cudnn.benchmark.log")"
    limited $((deadline - SECONDS)) "$1" "${command[@]}" || status=1
    return $status
}

# compare PART: what takes long to compile is among the ceilings.
compare() {
    limited 120 "$1" "${measure[@]}" compare --batch "${1#*-}" --seconds 3 --without torch.compile
}

triton() {
    limited 120 triton "${pytest[@]}" benchmarks/bench_triton.py --benchmark-enable --benchmark-max-time=0.05 \
        --benchmark-json="$out/triton.json"
}

sanitize() {
    local tool status=0 only
    for tool in memcheck racecheck synccheck initcheck; do
        only=(--kernel-name kns=skipnet)
        [ $tool != initcheck ] || only=()  # it has to see who else writes
        # Every tensor an allocation of its own, so that what lies beside it is out of bounds.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited 60 "sanitize-$tool" \
            compute-sanitizer --tool $tool --report-api-errors no --error-exitcode 9 "${only[@]}" \
            python3 benchmarks/gpu.py touch --batch 3 --dtype "${DTYPE:-float16}" || status=1
        echo "  $tool: $(tail -n 1 "$out/sanitize-$tool.log")"
    done
    return $status
}

# collect: one file to carry away, there at any time and whatever becomes of the parts that follow.
collect() { tar -czf "$out.tar.gz.new" -C "$(dirname "$out")" "$(basename "$out")" && mv "$out.tar.gz.new" "$out.tar.gz"; }

missing=$(python3 - <<'PYTHON'
import importlib.util
print(*(name for name in ("torch", "numpy", "PIL", "pytest", "pytest_benchmark", "pybind11", "setuptools")
        if importlib.util.find_spec(name) is None))
PYTHON
) || exit
[ -z "$missing" ] || { echo "not installed: $missing"; exit 1; }
{ nvidia-smi; nvcc --version; python3 -m pip list; } >"$out/machine.log" 2>&1

for part in "${parts[@]}"; do
    started=$SECONDS
    case $part in
        build | triton | sanitize) "$part" ;;
        tests) tests tests "(cuda or gpu) and not eager-cuda and not triton" ;;
        tests-triton) tests tests-triton "triton and not tunes_ahead" ;;  # which compiles everything there is
        ceiling-*) ceiling "$part" ;;
        compare-*) compare "$part" ;;
        routing-* | slope-* | waves-*) limited 60 "$part" "${measure[@]}" "${part%-*}" --batch "${part#*-}" --seconds 3 ;;
        gates | kernels | crossover) limited 90 "$part" "${measure[@]}" "$part" --seconds 2 ;;
        *) echo "no such part" >"$out/$part.log" && false ;;
    esac && word=done || { word=FAILED; failed+=("$part"); }
    reason=$(tail -qn 1 "$out/$part.log" 2>/dev/null)
    echo "$part: $word, $((SECONDS - started)) s; ${reason:0:200}"
    collect
    [ "$part $word" != "build FAILED" ] || break
done

python3 benchmarks/gpu.py table "$out" | tee "$out/table.txt"
collect
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}; see $out/*.log"; exit 1; }
