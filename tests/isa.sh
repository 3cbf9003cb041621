#!/usr/bin/env bash
# The numeric tests as another processor would run them, and the C kernels of processors that this one is not.
# usage: tests/isa.sh [c] [avx2] [one-thread]      all without a word
# Says at the end what ran and what did not; exit code 1 if something that ran has failed.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
build=build/isa
mkdir -p "$build"
[ $# -gt 0 ] || set -- c avx2 one-thread
files=(tests/kernels tests/runtime/test_goldens.py tests/runtime/test_audio.py tests/runtime/test_sampling.py
  tests/runtime/test_flow.py tests/runtime/test_bigvgan.py tests/runtime/test_loader.py tests/runtime/test_qwen2.py)
ran=() missed=() failed=()

# step NAME COMMAND...: runs it and notes how it ended
step() {
  echo "== $1"
  if "${@:2}"; then ran+=("$1"); else failed+=("$1"); fi
}

# compiled PROGRAM COMPILER FLAG... -- SOURCE...: the sources and all kernels, compiled side by side and linked
compiled() {
  local program=$build/$1 compiler=$2 flags=() jobs=()
  shift 2
  while [ "$1" != -- ]; do flags+=("$1"); shift; done
  rm -rf "$program.o" && mkdir "$program.o"
  for source in "${@:2}" kernels/cpu/csrc/*.c; do
    "$compiler" -std=gnu11 -O3 -fno-trapping-math -Ikernels/cpu/csrc "${flags[@]}" -c -o "$program.o/$(basename "$source" .c).o" "$source" &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job" || return 1; done
  "$compiler" "${flags[@]}" -o "$program" "$program.o"/*.o -lm -lpthread
}

# c_tests PROGRAM COMPILER: tests/kernels/isa.c with all kernels, built and run
c_tests() {
  compiled "$1" "$2" -fPIC -- tests/kernels/isa.c && "$build/$1"
}

# tile_tests: the tests of the C library with AMX's instructions emulated, on a processor that has the others
tile_tests() {
  compiled libcovo-tiles.so gcc -fPIC -shared -include tests/kernels/tiles.h -- && PYTHONPATH=tests "$bin/pytest" -q \
    -p kernels.emulated -k amx tests/kernels/test_cpu_{products,attention,layer,decoder}.py
}

# numeric NAME [VARIABLE=VALUE...]: the numeric tests in that environment
numeric() {
  step "numeric tests, $1" env "${@:2}" "$bin/pytest" -q "${files[@]}"
}

run_c() {
  for compiler in gcc clang; do
    if command -v "$compiler" >/dev/null; then step "C tests, $compiler" c_tests "isa-$compiler" "$compiler"
    else missed+=("C tests, $compiler: not installed"); fi
  done

  if grep -qw amx_tile /proc/cpuinfo; then missed+=("AMX emulated: this processor has it")
  elif grep -qw avx512_bf16 /proc/cpuinfo && command -v gcc >/dev/null; then step "tests of AMX, emulated" tile_tests
  else missed+=("AMX emulated: needs a processor with avx512_bf16, and gcc"); fi

  # Arm's kernels in an emulator, on a processor with products of bfloat16 and on one without
  if [ "$(uname -m)" = aarch64 ]; then missed+=("C tests in an emulator: this is an Arm processor")
  elif command -v aarch64-linux-gnu-gcc >/dev/null && command -v qemu-aarch64 >/dev/null; then
    step "C tests, aarch64, compiled" compiled isa-arm aarch64-linux-gnu-gcc -static -- tests/kernels/isa.c
    for processor in max cortex-a57; do
      step "C tests, aarch64 $processor, emulated" qemu-aarch64 -cpu "$processor" "$build/isa-arm"
    done
  else missed+=("C tests, aarch64: apt-get install gcc-aarch64-linux-gnu qemu-user"); fi
}

run_avx2() {
  if [ "$(uname -m)" != x86_64 ]; then missed+=("numeric tests, AVX2: not an x86-64 processor")
  else numeric AVX2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 COVO_MAX_CPU_ISA=avx2; fi
}

run_one-thread() { numeric "one thread" OMP_NUM_THREADS=1; }

for part; do declare -F "run_$part" >/dev/null || { echo "isa.sh: no part $part: c, avx2, one-thread" >&2; exit 2; }; done
for part; do "run_$part"; done

echo "== ran:"
printf '   %s\n' "${ran[@]}"
if [ ${#missed[@]} -gt 0 ]; then echo "== did not run:"; printf '   %s\n' "${missed[@]}"; fi
if [ ${#failed[@]} -gt 0 ]; then echo "== failed:"; printf '   %s\n' "${failed[@]}"; exit 1; fi
