#!/usr/bin/env bash
# Builds, tests and measures on a machine with an NVIDIA GPU of capability 9.0; each phase takes less than 8 minutes.
# It needs Python 3.10 or later with PyTorch, Triton, setuptools 77 or later, pybind11 and pytest, and nvcc; no network.
# Wheels that the machine lacks (diffusers, say) are taken from wheels/ at the root of the checkout, if that folder exists.
# bench measures the stage in ${PASSES:-3} passes, the rest in ${PASSES:-1}: one pass is quick and gives no bounds.
# Results: ${OUT:-benchmarks/results/device}; JSON is written after every row, so an interrupted phase keeps its rows.
set -uo pipefail

usage() {
    cat >&2 <<'TEXT'
usage: benchmarks/device.sh build-test|bench|sanitize|profile

  build-test  build the extensions, run the tests marked gpu
  bench       ceilings, then every op and the stage: cuda, triton and the eager baseline
  sanitize    compute-sanitizer memcheck and racecheck of the CUDA kernels on small inputs
  profile     Nsight Compute on the two kernels that take longest
TEXT
    exit 2
}

[ $# -eq 1 ] || usage
phase=$1
case $phase in build-test | bench | sanitize | profile) ;; *) usage ;; esac

cd "$(dirname "$0")/.." || exit 1
root=$PWD
out=${OUT:-$root/benchmarks/results/device}
python=${PYTHON:-python3}
deadline=$((SECONDS + 460))
mkdir -p "$out"
export PYTHONSAFEPATH=1 # kernels/ hides no installed package, from Python 3.11 on
export DIFFSEG_CUDA=1 DIFFSEG_CUDA_ARCHS=${DIFFSEG_CUDA_ARCHS:-90a} PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-16}

# Runs a command for no longer than what is left of the phase, and keeps what it prints.
within() {
    local name=$1
    shift
    local left=$((deadline - SECONDS))
    if [ $left -lt 10 ]; then
        echo "$name: not run, the phase's time is up" | tee -a "$out/$phase.log"
        return 1
    fi
    echo "== $name" | tee -a "$out/$phase.log"
    timeout --signal=INT --kill-after=15 "$left" "$@" 2>&1 | tee -a "$out/$phase.log"
}

install() {
    if compgen -G "$root/wheels/*.whl" >/dev/null; then
        local packages
        packages=$(mktemp -d) || return
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$packages" "$root"/wheels/*.whl || return
        export PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH}
    fi
    "$python" -c "import torch; torch.zeros(1, device='cuda')" || return  # else all tests would be skipped
    "$python" -c "
import setuptools
assert int(setuptools.__version__.split('.')[0]) >= 77, f'setuptools {setuptools.__version__} is too old: add a wheel'
" || return
    if [ "$phase" = build-test ] || ! "$python" -c "import diffseg._cuda" 2>/dev/null; then
        "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --editable . || return
    fi
    "$python" -m diffseg.cli info
}

# Whether the rows and tests of networks can run; else says why not.
networks() {
    local said
    said=$("$python" -c "import diffusers" 2>&1) && return
    echo "networks are left out: $(tail -n 2 <<<"$said")" | tee -a "$out/$phase.log"
    return 1
}

# Rows of one name. A backend that fails leaves its row to the others; where whole rows were lost or the process died, as
# after an error that ends the use of a GPU, each backend is measured alone.
bench() {
    local name=$1 status=0 backend
    shift
    within "bench $name" "$python" -m diffseg.cli bench "$@" --device cuda --json "$out/$name.json" || status=$?
    [ $status -eq 1 ] && grep -q '"state": "failed"' "$out/$name.json" || [ $status -ge 132 ] || return $status
    for backend in cuda triton; do
        within "bench $name, $backend" "$python" -m diffseg.cli bench "$@" --device cuda --backend $backend \
            --json "$out/$name-$backend.json"
    done
    return 1
}

run_build_test() {
    local status=0
    gpu_tests kernels tests/test_gpu_kernels.py tests/test_compat.py || status=$?
    if networks; then
        gpu_tests networks tests/test_graphs.py tests/test_capture.py tests/test_sdpa.py tests/test_folder.py -k "not inductor" || status=$?
        gpu_tests inductor tests/test_graphs.py tests/test_capture.py -k inductor || status=$?  # compiles for minutes
    fi
    return $status
}

gpu_tests() {
    local name=$1
    shift
    within "tests marked gpu: $name" "$python" -m pytest -m gpu "$@" -q --durations=10 \
        --junitxml "$out/gpu-tests-$name.xml"
}

run_bench() {
    local status=0
    bench stage segment aggregate merge label --case sd14 --seconds 1 --passes "${PASSES:-3}" || status=$?
    bench rounds round1 rounds merge --case noise sd14 --seconds 0.5 --passes "${PASSES:-1}" || status=$?
    bench calls call maps --seconds 0.3 --passes "${PASSES:-1}" || status=$?
    bench batches segment --case sd14 --batch 4 8 --seconds 0.5 --passes "${PASSES:-1}" || status=$?
    bench sizes segment --case sd14 --size 320 768 1024 --seconds 0.5 --passes "${PASSES:-1}" || status=$?
    if networks; then
        bench pipeline pipeline capture --architecture sd14 --batch 1 4 8 --seconds 2 --passes "${PASSES:-1}" ||
            status=$?
    fi
    return $status
}

run_sanitize() {
    local status=0 tool
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in "memcheck --report-api-errors no" racecheck; do  # calls that PyTorch tries and handles are no errors
        # shellcheck disable=SC2086
        within "compute-sanitizer $tool" compute-sanitizer --tool $tool --error-exitcode 1 \
            --kernel-name "kns=${DIFFSEG_KERNELS:-diffseg}" \
            "$python" benchmarks/small_inputs.py cuda || status=1
    done
    return $status
}

run_profile() {
    local kernels kernel skip status=0
    mapfile -t kernels < <("$python" benchmarks/slowest_kernels.py 2>>"$out/$phase.log")
    [ ${#kernels[@]} -gt 0 ] || { echo "no kernel was found: see $out/$phase.log" >&2; return 1; }
    for kernel in "${kernels[@]}"; do
        read -r kernel skip <<<"$kernel"
        within "ncu $kernel" ncu --set full --clock-control none --kernel-name "$kernel" --launch-skip "$skip" \
            --launch-count 1 --force-overwrite --export "$out/$kernel" --page details \
            "$python" benchmarks/slowest_kernels.py --run || status=1
        ncu --import "$out/$kernel.ncu-rep" --page details >"$out/$kernel.txt" 2>/dev/null || status=1
    done
    return $status
}

install > >(tee "$out/$phase.log") 2>&1 || exit 1
"run_${phase//-/_}"
