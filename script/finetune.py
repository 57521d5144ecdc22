"""Fine-tune a pruned model and keep its zeros: low-rank updates that are masked and merged, or all weights left.

    python script/finetune.py --model PRUNED --data c4 --save_model OUT

Its flags are in docs/flags.md, what it does in docs/finetuning.md.
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while libraries are imported says nothing

sys.path.insert(0, str(Path(__file__).parents[1]))

from lib import cli, results
from lib.finetune.config import FinetuneConfig
from lib.finetune.run import run

if __name__ == "__main__":
    sys.exit(cli.main(lambda config: results.finetuned_summary(run(config)), kind=FinetuneConfig))
