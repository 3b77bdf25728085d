#!/usr/bin/env bash
# Everything that CI checks: format, lint, all tests (the slow ones run the real model). Without an active
# environment it makes .venv and installs first. Arguments go to pytest: bash tests/run.sh -m "not slow"
set -euo pipefail
. "$(dirname "$0")/../recipes/environment.sh"
ruff format --check .
ruff check .
python -m pytest "$@"
