"""Everything that is written: results, pictures, the metric cache, the checkpoint. Nothing else writes files."""

from .cache import MetricCache, load_sampled_windows, metric_folder, save_sampled_windows
from .checkpoint import RECORD_FILE, convert_to_safetensors, describe_checkpoint, save_checkpoint
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
from .record import PruningRecord
from .report import write_report
from .run import (
    COLUMNS,
    activation_store,
    append_result,
    build_record,
    layer_records,
    overall_sparsity,
    prepare,
    run_folder,
    summary,
    write_run,
)

__all__ = [
    "COLUMNS",
    "RECORD_FILE",
    "Journal",
    "MetricCache",
    "PruningRecord",
    "TrainingState",
    "activation_store",
    "append_result",
    "build_record",
    "convert_to_safetensors",
    "describe_checkpoint",
    "finetuned_record",
    "finetuned_summary",
    "layer_records",
    "load_sampled_windows",
    "metric_folder",
    "overall_sparsity",
    "prepare",
    "prepare_finetuning",
    "pruning_record",
    "run_folder",
    "save_adapter",
    "save_checkpoint",
    "save_sampled_windows",
    "summary",
    "write_finetuned",
    "write_report",
    "write_run",
]
