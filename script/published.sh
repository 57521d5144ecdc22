#!/usr/bin/env bash
# A model's entries in the paper's main table, at 70 % with the published epsilons:
#     bash script/published.sh NAME [flags of main.py]     or, by its link,     bash script/NAME.sh [flags of main.py]
# MODEL= and SPARSITY= override.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/prune.sh"

# name, model, epsilon of magnitude_ww, wanda_ww and sparsegpt_ww
settings="
llama_7b    pinkmanlove/llama-7b-hf    0.3 0.2 0.2
llama_13b   huggyllama/llama-13b       0.5 0.3 0.3
llama_30b   huggyllama/llama-30b       0.4 0.3 0.3
llama_65b   huggyllama/llama-65b       0.4 0.3 0.3
llama2_7b   meta-llama/Llama-2-7b-hf   0.5 0.3 0.2
llama2_13b  meta-llama/Llama-2-13b-hf  0.4 0.3 0.3
llama2_70b  meta-llama/Llama-2-70b-hf  0.4 0.3 0.3
"

name=$(basename "$0" .sh)
if [ "$name" = published ]; then
    name=${1:-}
    shift || true
fi
while read -r known model magnitude wanda sparsegpt; do
    if [ -n "$known" ] && [ "$known" = "$name" ]; then
        model=${MODEL:-$model} sparsity=${SPARSITY:-0.7}
        prune "$model" magnitude_ww "$sparsity" "$magnitude" "$@"
        prune "$model" wanda_ww "$sparsity" "$wanda" "$@"
        prune "$model" sparsegpt_ww "$sparsity" "$sparsegpt" "$@"
        exit
    fi
done <<<"$settings"
echo "published.sh: '$name' is none of" $(awk '{print $1}' <<<"$settings") >&2
exit 2
