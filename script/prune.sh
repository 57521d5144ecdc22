# Shared by the scripts of the published models. To be sourced.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
PYTHON=.venv/bin/python
[ -x "$PYTHON" ] || PYTHON=python3

# prune MODEL METHOD SPARSITY EPSILON [FLAG ...]: one run by the published protocol.
prune() {
    local model=$1 method=$2 sparsity=$3 epsilon=$4
    shift 4
    "$PYTHON" main.py --model "$model" --prune_method "$method" --sparsity_ratio "$sparsity" --epsilon "$epsilon" \
        --cache_dir llm_weights --save "save_test/${model##*/}" "$@"
}
