#!/usr/bin/env bash
# The whole job on a machine with Python and nothing else: install, fetch a small model, prune it to 50 %,
# and compare its perplexity before and after. Some minutes on two cores once installed.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install requirements.txt
fetch_model

echo "Pruning SmolLM2-135M to 50 % with wanda_ww; calibration and evaluation on the Python language reference ..."
"$PYTHON" main.py --model smollm2 --prune_method wanda_ww --sparsity_ratio 0.5 --epsilon 0.2 \
    --calib_data pydoc --eval_data pydoc --seqlen 512 --nsamples 32 --eval_windows 32 --eval_dense \
    --plot --save results "$@"
