"""AlphaPruning as a library: everything the command does, without a command line."""

from .allocation import Problem, allocate
from .config import RunConfig
from .data import calibration_windows, evaluation_windows
from .errors import RunError
from .evaluate import perplexity, sparsity_by_matrix
from .load import find_source, load_model, load_tokenizer, open_model
from .masks import Pattern
from .model import LanguageModel
from .pruners import PRUNERS
from .quality import layer_quality
from .results import save_checkpoint
from .sequential import prune_model
from .sparse import sparse_model

__all__ = [
    "PRUNERS",
    "LanguageModel",
    "Pattern",
    "Problem",
    "RunConfig",
    "RunError",
    "allocate",
    "calibration_windows",
    "evaluation_windows",
    "find_source",
    "layer_quality",
    "load_model",
    "load_tokenizer",
    "open_model",
    "perplexity",
    "prune_model",
    "save_checkpoint",
    "sparse_model",
    "sparsity_by_matrix",
]
