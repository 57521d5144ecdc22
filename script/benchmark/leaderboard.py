"""Many methods under one protocol: perplexity, sparsity, seconds and memory of each, as a table, a CSV file and a plot.

    python script/benchmark/leaderboard.py script/benchmark/leaderboard.txt --save docs/leaderboard \
        --eval_data wikitext2=TEST.jsonl:64 pydoc:32 -- --model smollm2 --nsamples 64 ...

Each line of the list is `pruners allocations sparsities seeds [flags]`, the first four with commas between several, the
rest flags of main.py for the method and its windows; what follows `--` are flags of every run, but where its line says
otherwise. A run is what `main.py` does with these flags; the model is loaded once, and windows, spectra and scores of
allocations are shared. Two columns are filled where there is something to say: with --tasks the mean of their zero-shot
accuracies, and where the dense model writes text the seconds of that, unless an earlier command has written it. Runs
that `runs.csv` in the folder holds are not run again, and the files are written anew after each; protocol.txt keeps
what all runs there have in common. Several processes may fill one folder, as a dozen small models fit on a GPU: each
takes what none has.
"""

import argparse
import contextlib
import csv
import hashlib
import itertools
import logging
import shlex
import statistics
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from filelock import FileLock, Timeout
from torch import Tensor

from lib import cli, results, zero_shot
from lib.allocation import ALLOCATIONS
from lib.analysis import score
from lib.config import RunConfig
from lib.data import evaluation_windows, required_bos
from lib.errors import RunError
from lib.evaluate import perplexity, sparsity_by_matrix
from lib.fisher import row_fisher, row_weights
from lib.harness_tasks import load_tasks
from lib.load import find_source, load_model, load_tokenizer
from lib.memory import forget_peak, keep_freed_memory, resident_peak
from lib.options import options_of
from lib.plan import apply_plan, plan
from lib.quality import allocation_scores
from lib.results.files import check_folder
from lib.run_flags import OPTIONED
from lib.stopwatch import Stopwatch
from lib.windows import Windows, corpus_windows, with_sampled_windows

log = logging.getLogger("lib.leaderboard")

DENSE = "dense"
LOCKS = ".locks"  # in the folder: who is at what
USUAL = ("sparsity_type", "nsamples")  # which the protocol says, unless a line does
VARIED = (
    "ww_metric", *options_of(*OPTIONED), "mapping_type", "use_variant", "asymmetry", "fisher", "calib_self", "recover",
    "recover_nsamples", "distill", "recover_self", *USUAL,
)  # fmt: skip
NUMBERS = ("achieved", "allocation_seconds", "pruning_seconds", "peak_memory_gb")
WRITTEN = 0.05  # seconds: what takes less was in the cache
ACCURACY, SAMPLING = "accuracy", "sampling_seconds"  # last, as boards from before have all columns but these


@dataclass(frozen=True)
class Text:
    """An evaluation text under a short name: `[name=]data[:windows]`."""

    name: str
    data: str
    windows: int | None

    @classmethod
    def parse(cls, given: str) -> "Text":
        name, _, rest = given.rpartition("=")
        data, _, windows = rest.rpartition(":") if rest.rpartition(":")[2].isdigit() else (rest, "", "")
        return cls(name or Path(data).stem, data, int(windows) if windows else None)

    @property
    def column(self) -> str:
        return f"perplexity_{self.name}"


@dataclass(frozen=True)
class Run:
    """settings: what the method is beside its name, as flags of main.py"""

    config: RunConfig
    settings: str

    @property
    def key(self) -> str:
        """A run apart from the protocol."""
        method, sparsity = self.config.prune_method, f"{self.config.sparsity:g}"
        return " ".join(filter(None, [method, sparsity, f"seed{self.config.seed}", self.settings]))


def entries(path: Path, common: list[str]) -> Iterator[Run]:
    """A Run for each that the list asks for, in order and each once."""
    known = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if len(words) < 4:
            raise RunError(f"{path}: '{line}' is not `pruners allocations sparsities seeds [flags]`")
        pruners, allocations, sparsities, seeds = (word.split(",") for word in words[:4])
        named = {word.partition("=")[0].removeprefix("--").lower() for word in words[4:] if word.startswith("--")}
        if shared := sorted(named - {*VARIED}):
            raise RunError(f"{path}: '{line}': --{shared[0]} is one for all runs; give it after --")
        for sparsity, seed, pruner, allocation in itertools.product(sparsities, seeds, pruners, allocations):
            method = pruner if allocation == "uniform" else f"{pruner}_{allocation}"
            flags = ["--prune_method", method, "--sparsity_ratio", sparsity, "--seed", seed, "--no-eval_wikitext"]
            config = cli.parse([*common, *flags, *words[4:]])
            run = Run(config, _settings(config.effective(), named))
            if run.key not in known:
                known.add(run.key)
                yield run


def _settings(read: dict, named: set[str]) -> str:
    """What the run reads that is not the default, as main.py takes it; of what the protocol usually says, what its line
    has `named`.
    """
    defaults = RunConfig.__dataclass_fields__
    told = [name for name in VARIED if (name in named if name in USUAL else read[name] != defaults[name].default)]
    return " ".join(
        f"--{name} {' '.join(value) if isinstance(value := read[name], tuple) else value}".removesuffix(" True")
        for name in told
    )


def _windows_key(config: RunConfig) -> tuple:
    """What the calibration windows depend on, but for how many more are held out."""
    return config.seed, config.nsamples, config.sampled_windows[0], config.calibrated, config.calib_data, config.add_bos


def _without_folders(word: str) -> str:
    """A flag's value; a file, also after a corpus's name (c4:PATH), by its name alone."""
    corpus, colon, path = ("", "", word) if Path(word).is_file() else word.rpartition(":")
    return f"{corpus}{colon}{Path(path).name}" if Path(path).is_file() else word


class Board:
    """The runs that are done, kept in a folder as runs.csv, table.md and perplexity.png."""

    def __init__(self, folder: Path, texts: list[Text], common: list[str], tasks: list[str]):
        words = [*common, *(f"{t.name}={Path(t.data).name}:{t.windows}" for t in texts)]
        self._folder, self._texts, self._path = folder, texts, folder / "runs.csv"
        check_folder("--save", folder / LOCKS)
        with self._lock("files"):
            self._agree("protocol.txt", shlex.join(map(_without_folders, words)), "runs of another protocol")
            if tasks:
                self._agree("tasks.txt", shlex.join(tasks), "accuracies on other tasks")
        known = ("run", "method", "settings", "sparsity", "seed")
        self._columns = [*known, *(t.column for t in texts), *NUMBERS, ACCURACY, SAMPLING]
        self._read()

    def _read(self) -> None:
        self._rows: list[dict] = []
        if self._path.is_file():
            with self._path.open(encoding="utf-8", newline="") as file:
                self._rows = list(csv.DictReader(file))

    def _agree(self, name: str, said: str, other: str) -> None:
        """Write what all runs have in common, or find it written."""
        path = self._folder / name
        if not path.is_file():
            path.write_text(said + "\n", encoding="utf-8")
        elif path.read_text(encoding="utf-8") != said + "\n":
            raise SystemExit(f"{self._folder}: holds {other} ({name}); name another --save")

    def _lock(self, what: str, **options) -> FileLock:
        name = hashlib.sha256(what.encode()).hexdigest()[:16]
        return FileLock(self._folder / LOCKS / name, **options)

    @contextlib.contextmanager
    def turn(self, run: str) -> Iterator[bool]:
        """Whether the run is this process's to do: it is not done, and no other process is at it."""
        try:
            lock = self._lock(run).acquire(blocking=False)
        except Timeout:
            log.info("run: %s: another process is at it", run)
            yield False
            return
        with lock:
            self._read()
            yield not any(row["run"] == run for row in self._rows)

    def add(self, **row) -> None:
        """Keep one more run and write the files anew."""
        with self._lock("files"):
            self._read()
            self._rows.append({column: "" if row.get(column) is None else str(row[column]) for column in self._columns})
            partial = self._path.with_suffix(".partial")
            with partial.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, self._columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(self._rows)
            partial.replace(self._path)
            self._write()

    def write(self) -> None:
        """table.md and perplexity.png from the runs so far."""
        with self._lock("files"):
            self._read()
            self._write()

    def _methods(self) -> dict[tuple[float, str, str], list[dict]]:
        """(sparsity, method, settings) -> its runs over the seeds; by sparsity, best first."""
        groups: dict[tuple, list[dict]] = {}
        for row in self._rows:
            groups.setdefault((float(row["sparsity"]), row["method"], row["settings"]), []).append(row)
        first = self._texts[0].column
        ranked = sorted(groups.items(), key=lambda item: (item[0][0], _mean(item[1], first)))
        return dict(ranked)

    def _write(self) -> None:
        heads = ["sparsity", "method", *(f"perplexity, {t.name}" for t in self._texts), "seeds", "achieved"]
        heads += ["allocation, s", "pruning, s", "memory, GB"]
        more = {ACCURACY: ("mean zero-shot acc", 4), SAMPLING: ("own text, s", 0)}
        more = {column: how for column, how in more.items() if _values(self._rows, column)}
        heads += [head for head, _ in more.values()]
        lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        for (sparsity, method, extra), rows in self._methods().items():
            cells = [f"{sparsity:g}", f"`{' '.join(filter(None, [method, extra]))}`"]
            cells += [_spread(rows, text.column) for text in self._texts]
            cells += [str(len(rows))]
            numbers = [
                *zip(NUMBERS, (4, 0, 0, 1), strict=True),
                *((name, digits) for name, (_, digits) in more.items()),
            ]
            for name, digits in numbers:
                cells += [f"{_mean(rows, name):.{digits}f}" if _values(rows, name) else ""]
            lines.append(f"| {' | '.join(cells)} |")
        (self._folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._draw()

    def _draw(self) -> None:
        """Perplexity against sparsity: a curve for every method that was run at several, beside them grey dots for the
        others.

        The frame is that of the curves: what is more than twice above them is in the table only.
        """
        from cycler import cycler
        from matplotlib import colormaps  # takes a second to import
        from matplotlib.figure import Figure

        from lib.plots import set_perplexity_axis

        text, curves, others, highest = self._texts[0], {}, "others, at one sparsity", 0.0
        for (sparsity, method, extra), rows in self._methods().items():
            curves.setdefault(" ".join(filter(None, [method, extra])), []).append((sparsity, rows))
        # As at their right end, so that the legend beside them reads from top to bottom.
        curves = dict(sorted(curves.items(), key=lambda curve: -_mean(curve[1][-1][1], text.column)))
        any_curve = any(len(points) > 1 for points in curves.values())
        figure = Figure(figsize=(11, 5), layout="constrained")
        axes = figure.subplots()
        axes.set_prop_cycle(cycler(linestyle=["-", "--"]) * cycler(color=colormaps["tab20"].colors))
        for name, points in curves.items():
            if name == DENSE:
                axes.axhline(_mean(points[0][1], text.column), color="grey", linestyle=":", label=name)
            elif len(points) > 1 or not any_curve:
                means = [_mean(rows, text.column) for _, rows in points]
                low = [mean - min(_values(rows, text.column)) for mean, (_, rows) in zip(means, points, strict=True)]
                high = [max(_values(rows, text.column)) - mean for mean, (_, rows) in zip(means, points, strict=True)]
                highest = max(highest, *means)
                places = [sparsity for sparsity, _ in points]
                axes.errorbar(places, means, yerr=[low, high], marker="o", capsize=3, label=textwrap.fill(name, 44))
            else:
                axes.plot(points[0][0], _mean(points[0][1], text.column), ".", color="grey", zorder=0, label=others)
                others = None  # named once
        axes.set_xlabel("share of zeros")
        set_perplexity_axis(axes, text.name)
        axes.set_xticks(sorted({sparsity for sparsity, method, _ in self._methods() if method != DENSE}))
        if highest:
            axes.set_ylim(top=2 * highest)
        legend = figure.legend(fontsize="small", loc="outside right upper")
        lines = sum(label.get_text().count("\n") + 1 for label in legend.get_texts())
        figure.set_figheight(max(5, 0.2 * lines))
        figure.savefig(self._folder / "perplexity.png", dpi=120)


def _values(rows: list[dict], column: str) -> list[float]:
    return [float(row[column]) for row in rows if row.get(column)]


def _mean(rows: list[dict], column: str) -> float:
    return statistics.fmean(_values(rows, column))


def _spread(rows: list[dict], column: str) -> str:
    """Mean, and with several seeds the standard deviation."""
    values = _values(rows, column)
    return f"{_mean(rows, column):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


class Runner:
    """One model in memory, and whatever several runs have in common.

    Those are the windows, the spectra, and of each seed one pass of the dense model, from which every allocation that
    the list names gets its scores; the seconds of what is shared count for every run that uses it. Statistics of the
    first block are taken anew: they are a thirtieth of a pass.
    """

    def __init__(self, configs: list[RunConfig], texts: list[Text], tasks: list[str], limit: int | None):
        config = configs[0]
        self._scoring = list(dict.fromkeys(c.allocation for c in configs if ALLOCATIONS[c.allocation].score))
        self._source = find_source(config.model, config.cache_dir, config.trust_remote_code)
        self._tokenizer = load_tokenizer(self._source)
        self._texts = texts
        self._evaluation = {
            text.column: evaluation_windows(
                text.data,
                self._tokenizer,
                seqlen=config.seqlen,
                limit=text.windows,
                add_bos=config.add_bos,
                cache_dir=config.cache_dir,
            )
            for text in texts
        }
        bos = required_bos(self._tokenizer) if config.add_bos == "every" else None
        self._tasks = load_tasks(tasks, limit=limit, bos=bos, cache_dir=config.cache_dir) if tasks else None
        if self._tasks and self._tasks.missing:
            raise RunError(f"--tasks: {self._tasks.missing}, and the mean is of all or none")
        self._model = load_model(self._source, config.device, config.dtype, self._tokenizer)
        self._values: dict[tuple, tuple[object, float]] = {}
        self._written: dict[int, tuple[float, int]] = {}  # seed -> seconds of its series of windows, how many
        self._saved = 0.0  # seconds that this run would have spent on what it found remembered

    def _cached(self, *key, measure):
        if key in self._values:
            self._saved += self._values[key][1]
        else:
            begin = time.perf_counter()
            self._values[key] = measure(), time.perf_counter() - begin
        return self._values[key][0]

    def _shared(self, config: RunConfig, calibration: Tensor, batch: int, key: str, measure):
        """What `plan` measures, from the one pass over the dense model where it is an allocation's own scores."""
        if not ALLOCATIONS[config.allocation].score or key.startswith("trial"):
            return self._cached(key, *_windows_key(config), measure=measure)
        options = [config.options[option.name] for name in self._scoring for option in ALLOCATIONS[name].options]
        return self._cached(
            "scores", config.mapping_type, *options, *_windows_key(config),
            measure=lambda: allocation_scores(
                self._model, self._scoring, calibration, config.options, config.mapping_type, batch_size=batch
            ),
        )[config.allocation]  # fmt: skip

    def _windows(self, config: RunConfig) -> tuple[Windows, float]:
        """The windows, and the seconds that the dense model took to write its part of them: of one seed they are the
        first of a series, of which other runs may have written more.
        """
        key = config.held_out, config.recovery_windows, *_windows_key(config)
        windows = self._cached("windows", *key, measure=lambda: corpus_windows(config, self._tokenizer, config.seqlen))
        if not config.samples_text:
            return windows, 0.0
        _ = self._model.digest  # which names the cached text, and reads all weights when first asked for
        begin = time.perf_counter()
        windows = self._cached(
            "own text", config.sampled_windows, *key,
            measure=lambda: with_sampled_windows(config, windows, self._model, config.seqlen),
        )  # fmt: skip
        count = config.windows_written
        seconds, most = self._written.get(config.seed, (0.0, 0))
        if count > most:
            seconds, most = self._written[config.seed] = seconds + time.perf_counter() - begin, count
        return windows, seconds * count / most

    def _fisher(self, config: RunConfig, calibration: Tensor):
        return self._cached("fisher", *_windows_key(config), measure=lambda: row_fisher(self._model, calibration))

    def evaluate(self, config: RunConfig) -> dict[str, str]:
        """Perplexity of the model as it stands on every text, and its mean accuracy on the tasks."""
        batch_size = config.batch(config.seqlen)
        found = {
            column: f"{perplexity(self._model, windows, batch_size=batch_size, what=column):.4f}"
            for column, windows in self._evaluation.items()
        }
        if self._tasks:
            found[ACCURACY] = f"{zero_shot.mean(zero_shot.evaluate(self._model, self._tasks, config.batch)):.6f}"
        return found

    def run(self, run: Run) -> dict:
        """Allocate, prune, evaluate, and put the weights back; a row of the board."""
        config = run.config
        clock, events, batch = Stopwatch(), [], config.batch(config.seqlen)
        windows, sampling = self._windows(config)
        calibration = windows.calibration

        forget_peak()
        self._saved = 0.0
        with self._model.restored():
            with clock("all of pruning"):
                rows = row_weights(self._fisher(config, calibration), config.fisher) if config.fisher else None
            shared, self._saved = self._saved, 0.0
            with clock("allocate"):
                metrics = score(config, self._model, clock, events)[0] if config.scored else {}
                planned = plan(
                    config, self._model, metrics, calibration, windows.held_out, row_weights=rows, batch_size=batch,
                    cached=lambda key, measure: self._shared(config, calibration, batch, key, measure),
                )  # fmt: skip
            with clock("all of pruning"):
                apply_plan(
                    config, self._model, planned, windows, row_weights=rows, batch_size=batch, clock=clock,
                    events=events,
                )  # fmt: skip
            found = self.evaluate(config)
            layers = results.layer_records(self._model, {}, planned["targets"], sparsity_by_matrix(self._model))
        for event in events + planned["events"]:
            log.info("%s: %s", event["matrix"], event["message"])
        seconds, peak = clock.seconds(), resident_peak()  # a copy of the prunable weights included
        return {
            "run": run.key, "method": config.prune_method, "settings": run.settings,
            "sparsity": config.sparsity, "seed": config.seed, **found,
            "achieved": f"{results.overall_sparsity(layers):.6f}",
            "allocation_seconds": f"{seconds['allocate'] + self._saved:.1f}",
            "pruning_seconds": f"{seconds['all of pruning'] + shared:.1f}",
            "peak_memory_gb": f"{peak / 1e9:.2f}" if peak else "",
            SAMPLING: f"{sampling:.1f}" if sampling >= WRITTEN else "",
        }  # fmt: skip


def main() -> None:
    """Run what the list asks for and is not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path, help="the runs: pruners allocations sparsities seeds [flags] a line")
    parser.add_argument("--save", type=Path, required=True, help="folder of runs.csv, table.md and perplexity.png")
    parser.add_argument("--eval_data", nargs="+", required=True, help="texts: [name=]data[:windows]; the first ranks")
    parser.add_argument("--tasks", nargs="+", default=[], help="zero-shot tasks, as main.py takes them")
    parser.add_argument("--task_limit", type=int, help="evaluate the first documents of each task only")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, common = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    cli.set_up_logging(quiet=False)
    keep_freed_memory(cli.FREED_BYTES)
    texts = [Text.parse(given) for given in options.eval_data]
    if len({text.name for text in texts}) < len(texts):
        raise RunError("--eval_data: two texts have one name; give names, NAME=DATA")
    limited = [f"--task_limit {options.task_limit}"] if options.task_limit else []
    board, runner = Board(options.save, texts, common, options.tasks and [*options.tasks, *limited]), None
    runs = list(entries(options.list, common))
    for run in runs:
        with board.turn(run.key) as to_do:
            if not to_do:
                continue
            log.info("run: %s", run.key)
            runner = runner or Runner([run.config for run in runs], texts, options.tasks, options.task_limit)
            with board.turn(DENSE) as to_do:
                if to_do:
                    board.add(run=DENSE, method=DENSE, sparsity=0, achieved=0, **runner.evaluate(run.config))
            board.add(**runner.run(run))
    if runner is None:
        board.write()


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        raise SystemExit(f"leaderboard.py: error: {error}") from None
