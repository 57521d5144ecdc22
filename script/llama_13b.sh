#!/usr/bin/env bash
# llama-13b at 70 % with the published epsilons (MODEL= and SPARSITY= override; further flags may follow).
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/prune.sh"
table huggyllama/llama-13b 0.5 0.3 0.3 "$@"
