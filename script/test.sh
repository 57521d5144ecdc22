#!/usr/bin/env bash
# Install what the tests need, fetch the embedded model, run the whole test suite.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install requirements-dev.txt
fetch_model
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest "$@"
