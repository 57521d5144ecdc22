"""What a streamed run has finished, so that the same command goes on after it."""

import json
import logging
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from .. import ranks
from ..config import RunConfig
from ..errors import RunError
from ..flags import Flags
from ..shards import ShardedModel
from ..storage import as_saved, held_as_saved
from .checkpoint import MARK, complete, write_model
from .files import check_folder, remove, write_file, write_text
from .run import run_folder

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"


class Unfinished:
    """What a run has finished so far, and whose run it is.

    Raises RunError where what is there belongs to another run, naming the first difference.
    """

    def __init__(self, folder: Path, config: Flags, digest: str):
        self._config, self._folder = config, folder
        self._header = {"config": config.deciding(), "model": {"digest": digest}}

    def _compare(self, path: Path, flag: str, folder: Path) -> None:
        """Refuse a header that is not this run's, naming the first difference."""
        if not path.is_file():
            return
        try:
            other = json.loads(path.read_text(encoding="utf-8"))
            config, digest = other["config"], other["model"]["digest"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{flag} {folder}: {path.name} is not a run's header; --restart begins anew") from error
        mine = json.loads(json.dumps(self._header["config"]))
        changed = [name for name in mine | config if config.get(name) != mine.get(name)]
        if changed:
            was, now = config.get(changed[0]), mine.get(changed[0])
            what = f"--{changed[0]} was {was} and is {now}"
        elif digest != self._header["model"]["digest"]:
            what = f"--model {self._config.model} had other weights"
        else:
            return
        raise RunError(f"{flag} {folder}: holds the unfinished result of another run: {what}; --restart begins anew")

    def recall(self, name: str, make):
        """`make()`, or what it returned when this run was here before."""
        path = self._folder / f"{name}.json"
        known = ranks.from_first(lambda: [json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else [])
        if known:
            return known[0]
        value = make()
        write_text(path, json.dumps(value) + "\n")
        return value


class Journal(Unfinished):
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
        found = ranks.from_first(self._find)
        self._where = Path(found["where"])
        self._records: list[dict] = found["records"]
        self.done = len(self._records)
        self.events = [event for record in self._records for event in record["events"]]
        if self.done:
            log.info("going on after block %d of %d: %s", self.done, len(model.blocks), self._folder)

    def _find(self) -> dict:
        """On the first rank: where the shards lie, and the records of the blocks that are committed."""
        whole = (self._folder / "header.json").is_file() and not self._partial.exists()
        where = self._target if whole and (self._target / INDEX).is_file() else self._partial
        self._compare(where / MARK, "--save_model", where)
        self._compare(self._folder / "header.json", "--save", self._folder)
        if where == self._partial:
            check_folder("--save_model", self._partial)
            text = json.dumps(self._header, indent=1) + "\n"
            write_text(self._partial / MARK, text)
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
        """Write the pruned block, which is resident, and then its record: what was `seen` of its inputs, by matrix."""
        from transformers.core_model_loading import revert_weight_conversion  # a second to import

        name = self._shard_name(block + 1)
        state = as_saved(self._model.block_state(block), self._model.saved_as)
        state = revert_weight_conversion(self._model.model, state)
        tensors = {key: tensor.contiguous() for key, tensor in state.items()}
        write_file(self._where / name, lambda path: save_file(tensors, path, {"format": "pt"}))
        record = {"block": block, "file": name, "events": events, "statistics": seen}
        write_text(self._record_path(block), json.dumps(record, indent=1) + "\n")
        self._records.append(record)
        ranks.barrier()

    def finish(self) -> None:
        """Write what lies outside the blocks, and give the whole checkpoint its name; from now on it is read from."""
        if self._where == self._partial and ranks.first():
            self._write_rest()
            remove(self._target)
            self._partial.rename(self._target)
            log.info("checkpoint whole: %s", self._target)
        ranks.barrier()
        self._where = self._target
        self.reread(len(self._model.blocks))

    def reread(self, blocks: int) -> None:
        """Have the model read its first `blocks` blocks from where they were committed."""
        files = [self._where / record["file"] for record in self._records[:blocks]]
        self._model.replace(range(blocks), files)

    def _write_rest(self) -> None:
        model, name = self._model, self._shard_name(0)
        scratch = self._partial / ".rest"
        remove(scratch)
        try:
            with held_as_saved(model.model, model.saved_as):
                write_model(model, as_saved(model.rest(), model.saved_as), scratch, max_shard_size="1000GB")
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
        complete(self._partial)

    def close(self) -> None:
        """The run is over: forget the way here."""
        ranks.barrier()
        remove(self._folder)
