#!/bin/sh
# Runs the tests of the NPU path on the emulated NPU: the device itself, the kernels, and the runtime with all its goldens.
# usage: tests/npu/run.sh [pytest arguments]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
exec "$here/emulated" pytest --device npu:0 tests/npu tests/runtime/test_goldens.py tests/runtime/test_token2wav.py \
    tests/runtime/test_decode.py::test_goldens_in_every_form "$@"
