#!/usr/bin/env bash
# llama-7b-hf at 70 % with the published epsilons (MODEL= and SPARSITY= override; further flags may follow).
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/prune.sh"
table pinkmanlove/llama-7b-hf 0.3 0.2 0.2 "$@"
