"""Everything that is written: results, pictures, the metric cache, the checkpoint. Nothing else writes files."""

from .cache import MetricCache, keep_text, known_text, metric_folder
from .checkpoint import MARK, as_safetensors, describe_checkpoint, save_checkpoint
from .journal import Journal
from .report import write_report
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
    "activation_store",
    "append_result",
    "as_safetensors",
    "build_record",
    "describe_checkpoint",
    "keep_text",
    "known_text",
    "layer_records",
    "metric_folder",
    "prepare",
    "run_folder",
    "save_checkpoint",
    "share_of_zeros",
    "summary",
    "write_report",
    "write_run",
]
