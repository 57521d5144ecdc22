#!/usr/bin/env bash
# The minimal example: LLaMA-7B to 70 % with wanda_ww. The model and its data download by themselves.
# MODEL=, METHOD=, SPARSITY= and EPSILON= override; further flags of main.py may follow.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/prune.sh"
prune "${MODEL:-pinkmanlove/llama-7b-hf}" "${METHOD:-wanda_ww}" "${SPARSITY:-0.7}" "${EPSILON:-0.2}" "$@"
