#!/bin/sh
# Runs the tests of the NPU path on the emulated NPU: the device itself, the kernels, and the runtime with all its goldens.
# usage: tests/npu/run.sh [pytest arguments]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
# of the runtime's tests those that take a device
runtime=$(grep -l "device: str" tests/runtime/test_*.py)
# shellcheck disable=SC2086
exec "$here/emulated" pytest -p emulation.workers --device npu:0 tests/npu $runtime "$@"
