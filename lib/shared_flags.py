"""Flags that pruning and fine-tuning have in common, with one meaning and one check."""

from dataclasses import dataclass

from .data import ADD_BOS, find_corpus
from .flags import Flags, flag
from .harness_tasks import PAPER
from .load import DTYPES, choose_device, locate

DISTILL = 0.5  # share of the divergence from the dense model in a loss that has the text's own beside it


@dataclass(frozen=True)
class SharedFlags(Flags):
    """The model's surroundings, the evaluation and the output of a command."""

    device: str = flag(
        "auto", "auto: cuda where there is one (several where one has no room), else cpu; or cpu, cuda, cuda:N",
        group="model",
    )  # fmt: skip
    cache_dir: str = flag("llm_weights", "folder for downloaded models and data, and metric values", group="model")
    trust_remote_code: bool = flag(False, "allow code that comes with a model from the hub", group="model")
    eval_zero_shot: bool = flag(False, "report accuracy on --tasks; fine-tuning, before and after", group="evaluation")
    eval_wikitext: bool = flag(
        True, "report perplexity on --eval_data; fine-tuning, before and after; --no-eval_wikitext turns it off",
        group="evaluation",
    )  # fmt: skip
    eval_data: str = flag(
        "wikitext2",
        "evaluation text: wikitext2, c4, ptb, pydoc, a path, or c4:PATH",
        group="evaluation",
        when="eval_wikitext",
    )
    eval_windows: int | None = flag(
        None, "evaluate the first windows only", group="evaluation", when="eval_wikitext", least=1, shown="all"
    )
    add_bos: str = flag(
        "once", "BOS once in front of the text, as its tokenizer has it, or in front of every window",
        group="evaluation", choices=lambda: list(ADD_BOS),
    )  # fmt: skip
    tasks: tuple[str, ...] = flag(
        PAPER, "zero-shot tasks: tasks, groups and tags of lm_eval, or .yaml files and folders of your own",
        group="evaluation", when="eval_zero_shot",
    )  # fmt: skip
    task_limit: int | None = flag(
        None,
        "evaluate the first documents of each task only",
        group="evaluation",
        when="eval_zero_shot",
        least=1,
        shown="all",
    )
    save: str = flag("results", "folder for results", group="output", metavar="DIR")
    save_dtype: str = flag(
        "auto", "dtype of the checkpoint; auto: every tensor's own in the files of the model that is read",
        group="output", choices=lambda: list(DTYPES),
    )  # fmt: skip
    quiet: bool = flag(False, "no log and no progress bars; the final table is printed all the same", group="output")

    def check_shared(self) -> None:
        """Raises RunError for a device, an evaluation or a model that cannot be had."""
        choose_device(self.device)
        if self.asks("eval_zero_shot"):
            self.check_named("tasks")
        if self.asks("eval_wikitext"):
            find_corpus("--eval_data", self.eval_data)
        locate(self.model, self.cache_dir)
