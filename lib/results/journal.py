"""The journal of a streamed run: which blocks are pruned and saved, so that the same command resumes after them."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from .. import ranks
from ..config import RunConfig
from ..errors import RunError
from ..flags import Flags
from ..shards import ShardedModel
from ..storage import held_in_save_dtypes, in_save_dtypes
from .checkpoint import RECORD_FILE, finalize_folder, write_model
from .files import check_folder, remove, write_file, write_text
from .run import run_folder

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"


class Resumable:
    """The state of an interrupted run, with a header that says which run it belongs to.

    Raises RunError for the state of another run, naming the first difference.
    """

    def __init__(self, folder: Path, config: Flags, digest: str):
        self._config, self._folder = config, folder
        self._header = {"config": config.result_flags(), "model": {"digest": digest}}

    def _compare(self, path: Path, flag: str, folder: Path) -> None:
        """Refuse a header that is not this run's, naming the first difference."""
        if not path.is_file():
            return
        try:
            other = json.loads(path.read_text(encoding="utf-8"))
            config, digest = other["config"], other["model"]["digest"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{flag} {folder}: {path.name} is not a run's header; --restart begins anew") from error
        own = json.loads(json.dumps(self._header["config"]))
        given = json.loads(json.dumps(asdict(self._config)))  # which the record of a finished run has
        changed = [name for name, value in own.items() if config.get(name) not in (value, given[name])]
        if changed:
            was, now = config.get(changed[0]), own[changed[0]]
            what = f"--{changed[0]} was {was} and is {now}"
        elif digest != self._header["model"]["digest"]:
            what = f"--model {self._config.model} had other weights"
        else:
            return
        raise RunError(f"{flag} {folder}: holds the unfinished result of another run: {what}; --restart begins anew")

    def cached(self, name: str, make):
        """`make()`, or its result from before the run was interrupted."""
        path = self._folder / f"{name}.json"
        known = ranks.from_main(lambda: [json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else [])
        if known:
            return known[0]
        value = make()
        write_text(path, json.dumps(value) + "\n")
        return value


class Journal(Resumable):
    """A streamed run's finished blocks: a shard each beside --save_model, a record each in the run's folder.

    done    blocks that are committed and need not be pruned again
    events  those of the committed blocks

    The checkpoint grows in a hidden folder beside its own and takes its name when it is whole. Every file is written
    under a temporary name, synced and renamed, a block's shard before its record, so that a run killed at any moment
    finds each block either committed or not. Raises RunError where what is there belongs to another run.
    """

    def __init__(self, config: RunConfig, model: ShardedModel):
        super().__init__(run_folder(config) / "journal", config, model.digest)
        self._model = model
        self._target = Path(config.save_model).resolve()
        self._partial = self._target.with_name(f".{self._target.name}.partial")
        if config.restart:
            remove(self._folder)
            remove(self._partial)
        ranks.barrier()
        found = ranks.from_main(self._find)
        self._where = Path(found["where"])
        self._records: list[dict] = found["records"]
        self.done = len(self._records)
        self.events = [event for record in self._records for event in record["events"]]
        if self.done:
            log.info("resuming after block %d of %d: %s", self.done, len(model.blocks), self._folder)

    def _find(self) -> dict:
        """On the first rank: where the shards lie, and the records of the blocks that are committed."""
        whole = (self._folder / "header.json").is_file() and not self._partial.exists()
        where = self._target if whole and (self._target / INDEX).is_file() else self._partial
        self._compare(where / RECORD_FILE, "--save_model", where)
        self._compare(self._folder / "header.json", "--save", self._folder)
        if where == self._partial:
            check_folder("--save_model", self._partial)
            text = json.dumps(self._header, indent=1) + "\n"
            write_text(self._partial / RECORD_FILE, text)
            write_text(self._folder / "header.json", text)
        for folder in (where, self._folder):
            for left in folder.glob(".*"):  # of a write that was cut short
                left.unlink()
        records = []
        while (path := self._record_path(len(records))).is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            if not (where / record["file"]).is_file():
                break
            records.append(record)
        return {"where": str(where), "records": records}

    def _record_path(self, block: int) -> Path:
        return self._folder / f"block-{block:05}.json"

    def _shard_name(self, number: int) -> str:
        """Of the shard of block `number` - 1; number 0 is what lies outside the blocks."""
        return f"model-{number + 1:05}-of-{len(self._model.blocks) + 1:05}.safetensors"

    def commit(self, block: int, seen: dict[str, dict], events: list[dict]) -> None:
        """Save the pruned block, which is resident, and its record; `seen` are its statistics' summaries by matrix."""
        from transformers.core_model_loading import revert_weight_conversion  # a second to import

        name = self._shard_name(block + 1)
        state = in_save_dtypes(self._model.block_state(block), self._model.save_dtypes)
        state = revert_weight_conversion(self._model.model, state)
        tensors = {key: tensor.contiguous() for key, tensor in state.items()}
        write_file(self._where / name, lambda path: save_file(tensors, path, {"format": "pt"}))
        record = {"block": block, "file": name, "events": events, "statistics": seen}
        write_text(self._record_path(block), json.dumps(record, indent=1) + "\n")
        self._records.append(record)
        ranks.barrier()

    def finish(self) -> None:
        """Save what is outside the blocks and rename the complete checkpoint; the model is read from it from now on."""
        if self._where == self._partial and ranks.is_main():
            self._write_non_blocks()
            remove(self._target)
            self._partial.rename(self._target)
            log.info("checkpoint complete: %s", self._target)
        ranks.barrier()
        self._where = self._target
        self.use_committed(len(self._model.blocks))

    def use_committed(self, blocks: int) -> None:
        """From now on read the model's first `blocks` blocks from their committed shards."""
        files = [self._where / record["file"] for record in self._records[:blocks]]
        self._model.replace(range(blocks), files)

    def _write_non_blocks(self) -> None:
        model, name = self._model, self._shard_name(0)
        scratch = self._partial / ".rest"
        remove(scratch)
        try:
            with held_in_save_dtypes(model.model, model.save_dtypes):
                write_model(
                    model, in_save_dtypes(model.non_block_state(), model.save_dtypes), scratch, max_shard_size="1000GB"
                )
            for path in sorted(scratch.iterdir()):
                path.rename(self._partial / (name if path.suffix == ".safetensors" else path.name))
            scratch.rmdir()
        except OSError as error:
            raise RunError(f"--save_model {self._target}: cannot be written: {error.strerror or error}") from error
        places, size = {}, 0
        for file in sorted(self._partial.glob("*.safetensors")):
            with safe_open(file, framework="pt") as shard:
                places |= dict.fromkeys(shard.keys(), file.name)
            size += file.stat().st_size
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        write_text(self._partial / INDEX, json.dumps(index, indent=1) + "\n")
        finalize_folder(self._partial)

    def close(self) -> None:
        """The run is complete: remove the journal."""
        ranks.barrier()
        remove(self._folder)
