#!/usr/bin/env bash
# Everything that CI checks: format, lint, all tests (the slow ones run the real model). Without an active
# environment it makes .venv and installs first. Arguments go to pytest: bash tests/run.sh -m "not slow"
# Two files of tests run at a time, on one thread each; WORKERS=0 runs one after the other, in this process.
set -euo pipefail
. "$(dirname "$0")/../recipes/environment.sh"
ruff format --check .
ruff check .
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m pytest -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
