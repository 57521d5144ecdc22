#!/usr/bin/env bash
# llama-65b at 70 % with the published epsilons (MODEL= and SPARSITY= override; further flags may follow).
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/prune.sh"
table huggyllama/llama-65b 0.4 0.3 0.3 "$@"
