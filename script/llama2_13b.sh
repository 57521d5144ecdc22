#!/usr/bin/env bash
# Llama-2-13b-hf at 70 % with the published epsilons (MODEL= and SPARSITY= override; further flags may follow).
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/prune.sh"
table meta-llama/Llama-2-13b-hf 0.4 0.3 0.3 "$@"
