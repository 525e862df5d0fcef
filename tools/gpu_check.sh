#!/usr/bin/env bash
# Does aiosd use a GPU? Builds llama.cpp for this machine's card and measures with it, in about ten minutes:
#
#     tools/gpu_check.sh [FOLDER]      results as JSON and as text in FOLDER (build/gpu)
#
# Needs an NVIDIA card with its driver, the CUDA toolkit (nvcc), cmake, and what `make` needs. aiosd and llama-server
# use the same build. A step that fails or takes too long is reported, and the next one starts. Not part of the tests.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly LIMIT_S="${GPU_CHECK_S:-600}"
readonly OUT="$(realpath -m "${1:-build/gpu}")"
readonly PYTHON=.venv/bin/python
failed=0

main() {
    command -v nvidia-smi >/dev/null || stop "no nvidia-smi: is there a card, and its driver?"
    command -v nvcc >/dev/null || stop "no nvcc: install the CUDA toolkit, or put its bin/ into PATH"
    mkdir -p "$OUT"
    nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv | tee "$OUT/card.csv"
    step install build || stop "the build failed"
    [ -e build/peers/bin/libllama.so ] || stop "llama.cpp was built without shared libraries"
    # llama-cpp-python then loads the libraries that were just built for the card instead of its own.
    export LLAMA_CPP_LIB_PATH="$PWD/build/peers/bin"
    step check uses_gpu || stop "llama.cpp does not find the card"
    local ours="--gpu-layers -1" theirs="-ngl 99" few
    few="$(($(nproc) < 8 ? $(nproc) : 8))"
    step layout shows_layout "$ours"
    step crowd "$PYTHON" benchmarks/crowd.py --model small --n 16 --n 64 --prefix 512 --flash on --no-lock \
        --threads "$few" --aiosd-options="$ours" --server-options="$theirs" --out "$OUT/crowd.json"
    step crowd-streams "$PYTHON" benchmarks/crowd.py --model small --n 16 --prefix 512 --flash on --no-lock \
        --threads "$few" --aiosd-options="$ours --kv-layout streams" --server-options="$theirs" \
        --out "$OUT/crowd-streams.json"
    step floor "$PYTHON" benchmarks/floor.py --model small --n 64 --prefix 512 \
        --threads "$few" --aiosd-options="$ours" --server-options="$theirs" --out "$OUT/floor.json"
    step switch "$PYTHON" benchmarks/switch.py --model small --only system --tokens 512 --tokens 2048 --rounds 3 \
        --threads "$few" --aiosd-options="$ours" --out "$OUT/switch.json"
    export AIOS_BENCH_CACHE="$OUT/models"
    step llama-8b "$PYTHON" benchmarks/models.py llama-8b-q4_0
    step crowd-8b "$PYTHON" benchmarks/crowd.py --model llama-8b-q4_0 --n 16 --prefix 512 --flash on --no-lock \
        --threads "$few" --aiosd-options="$ours" --server-options="$theirs" --out "$OUT/crowd-8b.json"
    echo "results in $OUT, after $SECONDS s; $failed steps failed"
    return $((failed > 0))
}

# Builds for this card's architecture only: all of them would take an hour.
build() {
    local arch
    arch="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')"
    make install && CMAKE_ARGS="-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=$arch" make peers
}

uses_gpu() {
    "$PYTHON" -c 'import sys, llama_cpp; sys.exit(not llama_cpp.llama_supports_gpu_offload())'
}

# Prints how the KV cache is laid out on the card and how large batches are. Fails unless slots share their cells.
shows_layout() {
    timeout 120 "$PYTHON" - "$1" <<'END'
import sys

from benchmarks import harness

with harness.Aiosd(harness.model_path("small"), *sys.argv[1].split()) as aiosd:
    stats = aiosd.stats()
    for name in ("device", "kv_layout", "cells", "prompt_batch", "prompt_batch_why", "attention", "threads_why"):
        print(f"{name}: {stats[name]}")
sys.exit(not stats["kv_layout"].startswith("unified"))
END
}

# step NAME COMMAND…: runs the command, with its output on the terminal and in a file. A program is ended when the time
# is up; a function is not.
step() {
    local name="$1" left=$((LIMIT_S - SECONDS)) code
    shift
    if ((left < 10)); then
        echo "== $name: left out, the time is up"
        failed=$((failed + 1))
        return 1
    fi
    echo "== $name ($left s left)"
    if [ "$(type -t "$1")" = function ]; then
        "$@" 2>&1 | tee "$OUT/$name.log"
    else
        timeout --kill-after=10 "$left" "$@" 2>&1 | tee "$OUT/$name.log"
    fi
    code="${PIPESTATUS[0]}"
    if ((code != 0)); then
        echo "== $name: failed ($code)"
        failed=$((failed + 1))
    fi
    return "$code"
}

stop() {
    echo "gpu_check: $1" >&2
    exit 1
}

main
