"""Everything that is written: results, pictures, the metric cache, the checkpoint. Nothing else writes files."""

from .cache import MetricCache, keep_text, known_text, metric_folder
from .checkpoint import MARK, as_safetensors, describe_checkpoint, save_checkpoint
from .finetuned import (
    TrainingState,
    finetuned_record,
    finetuned_summary,
    prepare_finetuning,
    pruning_record,
    save_adapter,
    write_finetuned,
)
from .journal import Journal
from .report import write_plan, write_report
from .run import (
    COLUMNS,
    activation_store,
    append_result,
    build_record,
    layer_records,
    prepare,
    run_folder,
    share_of_zeros,
    summary,
    write_run,
)

__all__ = [
    "COLUMNS",
    "MARK",
    "Journal",
    "MetricCache",
    "TrainingState",
    "activation_store",
    "append_result",
    "as_safetensors",
    "build_record",
    "describe_checkpoint",
    "finetuned_record",
    "finetuned_summary",
    "keep_text",
    "known_text",
    "layer_records",
    "metric_folder",
    "prepare",
    "prepare_finetuning",
    "pruning_record",
    "run_folder",
    "save_adapter",
    "save_checkpoint",
    "share_of_zeros",
    "summary",
    "write_finetuned",
    "write_plan",
    "write_report",
    "write_run",
]
