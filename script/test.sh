#!/usr/bin/env bash
# Install what the tests need, fetch the embedded model, run the whole test suite.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install requirements-dev.txt
fetch_model
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# Two files at a time, each on one core: the models are too small for a second thread to help.
exec env OMP_NUM_THREADS=1 "$PYTHON" -m pytest --numprocesses 2 --dist loadfile "$@"
