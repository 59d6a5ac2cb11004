#!/usr/bin/env bash
# Builds, tests and measures on a machine with an NVIDIA GPU, torch and nvcc, without a network, in
# less than 8 minutes: benchmarks/gpu_check.sh [--out FOLDER] [--quick] [--wheels FOLDER]
#
# --out     the results folder; by default benchmarks/results/gpu-<name>-<date>
# --quick   builds nothing and takes the installed package; without a GPU it ends within 2 minutes
# --wheels  a folder of wheels of packages that the machine lacks
#
# PYTHON names the interpreter that has torch; by default python3. Nothing is installed into its
# environment. Every step has a line in summary.md and a log, and none stops the others. Without a
# GPU each runs as far as it can. The exit code is 1 if a step failed.
set -euo pipefail

NO_GPU=73 NOT_INSTALLED=74 SKIPPED=75
LOG_BYTES=200000 FOLDER_BYTES=10000000

fail_usage() {
  echo "gpu_check.sh: $1, wanted [--out FOLDER] [--quick] [--wheels FOLDER]" >&2
  exit 2
}

out="" quick=0 wheels=""
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=1 ;;
    --out | --wheels)
      [ $# -gt 1 ] || fail_usage "$1 names no folder"
      if [ "$1" = --out ]; then out=$(realpath -m "$2"); else wheels=$(realpath "$2"); fi
      shift
      ;;
    *) fail_usage "the argument is '$1'" ;;
  esac
  shift
done
cd "$(dirname "$0")/.."

# ---- the steps ----------------------------------------------------------------------------------
# Each runs in a shell of its own; its last line of output is the summary's.

leave() { # code, reason
  echo "$2"
  exit "$1"
}

absent() { # modules: those that Python does not find
  local module found=""
  for module in "$@"; do
    "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$module') is None)" ||
      found+=" $module"
  done
  echo "$found"
}

need() { # modules
  local lacking
  lacking=$(absent "$@")
  [ -z "$lacking" ] || leave "$NOT_INSTALLED" "Python finds no module$lacking"
}

tool() { # name of a program of the CUDA toolkit: its path
  command -v "$1" || PATH=${CUDA_HOME:-/usr/local/cuda}/bin command -v "$1" ||
    leave "$NOT_INSTALLED" "$1 is not installed"
}

install_wheels() {
  "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$site" "$wheels"/*.whl
  echo "$(find "$wheels" -name '*.whl' | wc -l) wheels"
}

machine() {
  git describe --always --dirty 2> /dev/null || echo "no git revision"
  uname -srm
  if command -v nvidia-smi > /dev/null; then nvidia-smi || true; fi
  if nvcc=$(tool nvcc); then "$nvcc" --version; fi
  "$python" - << 'PYTHON'
import sys

import torch

print("python", sys.version.split()[0], "torch", torch.__version__, "for CUDA", torch.version.cuda)
try:
    import triton

    print("triton", triton.__version__)
except ImportError:
    print("triton is not installed")
if not torch.cuda.is_available():
    print("torch sees no GPU")
for k in range(torch.cuda.device_count()):
    seen = torch.cuda.get_device_properties(k)
    print(f"{seen.name}, compute capability {seen.major}.{seen.minor},",
          f"{seen.total_memory / 2**30:.0f} GiB, {seen.multi_processor_count} multiprocessors")
PYTHON
  [ "$has_gpu" = 0 ] || return 0
  [ "$gpu" = none ] || leave 1 "nvidia-smi shows $gpu, but torch sees no GPU"
  exit "$NO_GPU"
}

pip_build() { # WCMI_FAST_CUDA
  WCMI_FAST_CUDA=$1 "$python" -m pip install --no-index --no-build-isolation --no-deps \
    --target "$site" "$scratch/sources"
}

cmake_build() {
  cmake -S "$scratch/sources" -B "$scratch/cmake" -DCMAKE_BUILD_TYPE=Release -DWCMI_FAST_CUDA=ON \
    -DWCMI_FAST_OUTPUT="$scratch/sources/wcmi_fast" -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" &&
    cmake --build "$scratch/cmake" --parallel "$(nproc)" &&
    cp -r "$scratch/sources/wcmi_fast" "$site"
}

build() {
  local lacking
  [ "$quick" = 0 ] || leave "$SKIPPED" "--quick: takes the installed package"
  copy_sources
  CUDACXX=$(tool nvcc) || leave "$NOT_INSTALLED" "nvcc is not installed"
  lacking=$(absent pip setuptools pybind11)
  for name in cmake ninja; do
    command -v "$name" > /dev/null || lacking+=" $name"
  done
  [ -z "$lacking" ] || echo "not installed:$lacking"
  # For this GPU alone, which saves most of the time.
  CUDAARCHS="$("$python" -c 'import torch
print(*torch.cuda.get_device_capability(), sep="") if torch.cuda.is_available() else print(80)'
  )-real"
  export CUDACXX CUDAARCHS
  if pip_build 1; then leave 0 "built by pip for $CUDAARCHS"; fi
  if cmake_build; then leave 0 "built by cmake for $CUDAARCHS, as pip could not"; fi
  if pip_build 0; then leave 1 "csrc/cuda does not build; only the CPU's kernels are there"; fi
  leave 1 "nothing builds${lacking:+ without$lacking}; Triton's kernels need no build"
}

copy_sources() {
  mkdir -p "$scratch/sources"
  cp -r pyproject.toml setup.py CMakeLists.txt MANIFEST.in README.md LICENSE csrc wcmi_fast \
    "$scratch/sources"
  find "$scratch/sources" -name '*.so' -delete
}

info() {
  if [ -z "$(absent tyro rich)" ]; then
    COLUMNS=400 "$python" -m wcmi_fast info
  else
    "$python" -c 'from wcmi_fast import diagnosis
for line in diagnosis.lines(): print(*line)'
  fi | tee "$scratch/info"
  [ "$has_gpu" = 1 ] || leave "$NO_GPU" "$(grep 'back end cuda' "$scratch/info")"
  for name in cuda triton; do
    grep -q "back end $name *ready" "$scratch/info" || leave 1 "the back end $name is not ready"
  done
  echo "the back ends cuda and triton are ready"
}

tests() {
  local files options=(-q -m gpu -p no:cacheprovider)
  need pytest hypothesis numpy
  mapfile -t files < <(grep -l 'pytest\.mark\.gpu' tests/test_*.py)
  if [ "$has_gpu" = 0 ]; then
    "$python" -m pytest "${options[@]}" --collect-only tests/test_gpu.py
    exit "$NO_GPU"
  fi
  # Most of the time goes to Triton's compiler, of which each process runs one.
  [ -n "$(absent xdist)" ] || options+=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
  timeout --signal=INT $((limit - 10)) "$python" -m pytest "${options[@]}" "${files[@]}"
}

speed() {
  # gpu_model.py lies beside it.
  unset PYTHONSAFEPATH
  if [ "$has_gpu" = 0 ]; then
    "$python" benchmarks/gpu_speed.py --cpu --out "$out" --seconds $((limit / 2))
    leave "$NO_GPU" "gpu_speed.py ran with --cpu"
  fi
  "$python" benchmarks/gpu_speed.py --out "$out" --seconds $((limit - 20))
  echo "the tables are below"
}

sanitizer() {
  local program name verdict left=3 findings="" code=0
  if [ "$has_gpu" = 0 ]; then
    "$python" benchmarks/gpu_sanitize.py --cpu
    leave "$NO_GPU" "gpu_sanitize.py ran with --cpu"
  fi
  # Compiles what Triton has to compile, and tells a wrong result from a bad access.
  "$python" benchmarks/gpu_sanitize.py
  program=$(tool compute-sanitizer) || leave "$NOT_INSTALLED" "compute-sanitizer is not installed"
  for name in memcheck racecheck synccheck; do
    verdict=clean
    timeout --kill-after=5 $(((limit - SECONDS) / left)) "$program" --tool "$name" --error-exitcode 9 \
      --target-processes application-only --print-limit 10 \
      "$python" benchmarks/gpu_sanitize.py > "$scratch/$name.log" 2>&1 || verdict="failed ($?)"
    cat "$scratch/$name.log"
    if grep -q 'Device not supported' "$scratch/$name.log"; then
      leave "$NOT_INSTALLED" "compute-sanitizer does not support this machine"
    fi
    findings+="$name $verdict; " left=$((left - 1))
    [ "$verdict" = clean ] || code=1
  done
  leave "$code" "${findings%; }"
}

quickstart() {
  local device=cpu
  need tyro rich tomli_w jinja2 matplotlib mlxtend
  # It takes the CPU unless it is told otherwise.
  [ "$has_gpu" = 0 ] || device=cuda
  "$python" -m wcmi_fast quickstart --budget 0.1 --device "$device" --out "$scratch/runs"
  cp "$scratch"/runs/quickstart-*/results.json "$out/quickstart.json"
  [ "$has_gpu" = 1 ] || leave "$NO_GPU" "ran on the CPU"
}

# ---- running them -------------------------------------------------------------------------------

python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
site=$scratch/site
mkdir "$site"
# What is built here comes before what is installed, and the checkout's package does not count.
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export -f leave absent need tool install_wheels machine pip_build cmake_build build copy_sources \
  info tests speed sanitizer quickstart

has_gpu=0
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then has_gpu=1; fi
gpu=none
if command -v nvidia-smi > /dev/null; then
  gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | head -n 1) || gpu=none
fi
gpu=${gpu:-none}
slug=$(tr -cs 'A-Za-z0-9' '-' <<< "$gpu" | tr '[:upper:]' '[:lower:]' | sed 's/-*$//')
out=${out:-$PWD/benchmarks/results/gpu-$slug-$(date +%Y-%m-%d)}
mkdir -p "$out"
export NO_GPU NOT_INSTALLED SKIPPED python scratch site out quick wheels has_gpu gpu

allowed=0 failures=0 rows=""

# A step may take its share of the time, and what the steps before it left of theirs.
step() { # name, share in seconds
  local name=$1 log=$out/$1.log code=0 verdict start=$SECONDS limit note
  allowed=$((allowed + $2))
  limit=$((allowed > SECONDS ? allowed - SECONDS : 1))
  echo "== $name (at most $limit s)"
  export limit
  timeout --kill-after=5 "$limit" bash -c "set -euo pipefail; $name" \
    > "$log" 2>&1 < /dev/null || code=$?
  case $code in
    0) verdict=ok ;;
    "$NO_GPU") verdict="no GPU" ;;
    "$NOT_INSTALLED") verdict="not installed" ;;
    "$SKIPPED") verdict=skipped ;;
    124 | 137) verdict="failed: $limit s were not enough" ;;
    *) verdict="failed: exit code $code" ;;
  esac
  case $verdict in failed*) failures=$((failures + 1)) ;; esac
  note=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | tr '|' '/' | tr -s ' ' | cut -c 1-150) || note=""
  rows+="| $name | $verdict | $((SECONDS - start)) s | $note |"$'\n'
  echo "   $verdict: $note"
  truncate_log "$log"
}

# The beginning says what ran, the end how it came out.
truncate_log() { # file
  if [ "$(stat -c %s "$1")" -gt "$LOG_BYTES" ]; then
    {
      head -c $((LOG_BYTES / 2)) "$1"
      printf '\n[...]\n'
      tail -c $((LOG_BYTES / 2 - 100)) "$1"
    } > "$scratch/log"
    mv "$scratch/log" "$1"
  fi
}

summary() {
  echo "# gpu_check.sh on $gpu, $(date -u +%Y-%m-%dT%H:%MZ)"
  echo
  echo "Revision $(git describe --always --dirty 2> /dev/null || echo unknown)," \
    "$SECONDS s, $failures steps failed."
  echo
  echo "| step | result | took | last line of its log |"
  echo "| --- | --- | --- | --- |"
  echo "$rows"
  if [ -f "$out/speed.md" ]; then cat "$out/speed.md"; fi
}

rm -f "$out"/speed.* "$out/quickstart.json"
[ -z "$wheels" ] || step install_wheels 15
step machine 15
step build 115
if [ ! -d "$site/wcmi_fast" ] && { [ "$quick" = 0 ] || [ -n "$(absent wcmi_fast)" ]; }; then
  # Not an older package that is installed. Triton's kernels need no binaries.
  copy_sources
  cp -r "$scratch/sources/wcmi_fast" "$site"
fi
step info 15
step tests 105
step speed 110
step sanitizer 80
step quickstart 20
summary > "$out/summary.md"

size=$(du -sb "$out" | cut -f 1)
if [ "$size" -gt "$FOLDER_BYTES" ]; then
  echo "gpu_check.sh: $out has $size bytes, wanted at most $FOLDER_BYTES" >&2
  failures=$((failures + 1))
fi
echo "$out/summary.md: $failures steps failed, $SECONDS s"
[ "$failures" = 0 ]
