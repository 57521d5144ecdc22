"""One run on a GPU machine: does the project work there, exactly, how fast, and in how much memory.

    bash script/gpu_check.sh OUT [SECONDS]        on an 80 GB card in eight minutes
    bash script/gpu_check.sh OUT 300 --device cpu --hidden 64 --intermediate 176 --blocks 2 --seqlen 64 --nsamples 8

Each phase is a process of its own, so that one that dies takes nothing with it; a row is written the moment it is
measured, and a failure is a row as well. The table is printed at the end whatever happened.

tiny      every pruner and allocation on tiny models, CPU against GPU; the lines at which the host waits for the GPU
blocks    a block of LLaMA-7B's shape: statistics, every pruner on each of its matrices, seconds and memory
kernels   the single operations the times hang on, and the published code's way of doing the same
sparse    products with matrices held without their zeros, against dense float64 and beside cuBLAS; tokens by generate
commands  main.py's commands on that model, 4 blocks, with seconds by stage and peak memory
"""

# ruff: noqa: B023 (what is made in a loop here is called at once)

import argparse
import collections
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
PHASES = {"tiny": 75, "blocks": 75, "kernels": 60, "sparse": 90, "commands": 240}  # most seconds each
LIBRARIES = (
    "torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "scipy", "psutil", "tqdm", "datasets",
    "weightwatcher", "matplotlib", "gguf", "sentencepiece", "triton",
)  # fmt: skip

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out", type=Path)
parser.add_argument("--seconds", type=float, default=440)
parser.add_argument("--device", default="cuda")
parser.add_argument("--dtype", default="float16", help="of the model of LLaMA's shape")
for name, default in (
    ("hidden", 4096), ("intermediate", 11008), ("blocks", 4), ("vocabulary", 32000), ("seqlen", 2048), ("nsamples", 32),
    ("windows", 8),
):  # fmt: skip
    parser.add_argument(f"--{name}", type=int, default=default)
parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=list(PHASES))
parser.add_argument("--phase", help=argparse.SUPPRESS)
parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)


def left() -> float:
    return options.until - time.time()


def row(phase: str, what: str, **values) -> None:
    with (options.out / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"phase": phase, "what": what, **values}) + "\n")


def attempt(phase: str, what: str, function: Callable[[], dict | None], needs: float = 5) -> None:
    """A row of what `function` returns; of its error; or, where less than `needs` seconds are left, of that."""
    if left() < needs:
        return row(phase, what, skipped=f"{left():.0f} s left")
    begin = time.perf_counter()
    try:
        values = function() or {}
    except Exception as error:
        at = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)][-3:]
        with (options.out / "tracebacks.txt").open("a") as file:
            file.write(f"== {phase} {what}\n{traceback.format_exc()}\n")
        values = {"FAIL": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}", "at": " > ".join(at)}
    readable = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
    row(phase, what, **readable, s=f"{time.perf_counter() - begin:.2f}")


def parent() -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "rows.jsonl").write_text("")
    begin = time.time()
    for library in LIBRARIES:
        try:
            row("machine", library, version=importlib.metadata.version(library))
        except importlib.metadata.PackageNotFoundError:
            row("machine", library, version="not installed")
    with tempfile.TemporaryDirectory() as scratch:
        for phase in options.phases:
            limit = min(PHASES[phase], begin + options.seconds - time.time() - 5)
            if limit < 15:
                row(phase, "phase", skipped="no time left")
                continue
            flags = ["--phase", phase, "--until", str(time.time() + limit)]
            try:
                done = subprocess.run(
                    [sys.executable, __file__, *sys.argv[1:], *flags], timeout=limit + 10, cwd=scratch, text=True,
                    stderr=subprocess.PIPE, env=os.environ | {"SCRATCH": scratch},
                )  # fmt: skip
                if done.returncode:
                    row(phase, "phase", FAIL=f"exit {done.returncode}: {done.stderr.strip()[-200:]}")
            except subprocess.TimeoutExpired:
                row(phase, "phase", FAIL="over its time")
    rows = [json.loads(line) for line in (options.out / "rows.jsonl").read_text().splitlines()]
    (options.out / "rows.jsonl").unlink()
    report = {"flags": {k: v for k, v in vars(options).items() if k not in ("out", "phase", "until")}, "rows": rows}
    (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [line_of(dict(values)) for values in rows]
    lines += [f"{sum('FAIL' in values for values in rows)} failures; {time.time() - begin:.0f} s"]
    (options.out / "table.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def line_of(values: dict) -> str:
    mark, phase, what = "!" if "FAIL" in values else " ", values.pop("phase"), values.pop("what")
    return f"{mark} {phase:9} {what:46} " + "  ".join(f"{key}={value}" for key, value in values.items())


# ------------------------------------------------------------------------------------------------- the phases' tools


def on_gpu() -> bool:
    return options.device != "cpu"


def here() -> str:
    return f"cuda:{torch.cuda.current_device()}" if on_gpu() else "cpu"


def sync() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def seconds_of(function: Callable, repeat: int = 1) -> float:
    if repeat > 1:
        function()
    sync()
    begin = time.perf_counter()
    for _ in range(repeat):
        function()
    sync()
    return (time.perf_counter() - begin) / repeat


def seconds_of_kernels(calls: list[Callable]) -> float:
    """Of one of these calls on the GPU itself, without what Python takes to launch it: replayed as a CUDA graph."""
    if not on_gpu():
        return seconds_of(lambda: [call() for call in calls]) / len(calls)
    calls[0]()  # what is compiled is, outside the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return seconds_of(graph.replay, 10) / len(calls)


class Memory:
    """GB allocated at most since it was made, and above what was there then."""

    def __init__(self):
        if on_gpu():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated() if on_gpu() else 0

    @property
    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() / 1e9 if on_gpu() else 0.0

    @property
    def above(self) -> float:
        return self.peak - self._before / 1e9


def large_model() -> Path:
    """The folder of a random model of LLaMA's shape, made once, with heavy tails for spectra and masks to see."""
    from random_checkpoint import save_byte_tokenizer

    folder = Path(os.environ["SCRATCH"]) / "model"
    if not (folder / "config.json").is_file():
        large_llama().save_pretrained(folder, max_shard_size="1GB")
        save_byte_tokenizer(folder)
    return folder


def large_llama() -> "transformers.PreTrainedModel":
    torch.manual_seed(0)
    heads = max(2, options.hidden // 128)
    config = transformers.LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=options.intermediate,
        num_hidden_layers=options.blocks, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=max(2048, options.seqlen), tie_word_embeddings=False,
    )  # fmt: skip
    torch.set_default_dtype(getattr(torch, options.dtype) if on_gpu() else torch.float32)
    with torch.device(here()):
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                normal = torch.empty_like(parameter, dtype=torch.float32).normal_()
                parameter.copy_(normal * normal.abs().sqrt() * 0.8 * parameter.shape[1] ** -0.5)
    return model


# ------------------------------------------------------------------------------------------------------------- phases


def tiny() -> None:
    if on_gpu():
        card = torch.cuda.get_device_properties(0)
        row(
            "machine", card.name, GB=round(card.total_memory / 1e9, 1), gpus=torch.cuda.device_count(),
            cuda=torch.version.cuda, python=platform.python_version(), cores=os.cpu_count(),
            tf32=torch.backends.cuda.matmul.allow_tf32, override=os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
        )  # fmt: skip
    tokens, folders, on_cpu = tiny_tokens(8, 32), {}, {}

    def source(architecture: str):
        if architecture not in folders:
            folders[architecture] = Path(os.environ["SCRATCH"]) / architecture
            tiny_model(architecture).save_pretrained(folders[architecture])
        return lib.find_source(str(folders[architecture]))

    def pruned(architecture, name, pattern, rows, device, dtype, **more):
        model = lib.load_model(source(architecture), device, dtype)
        if rows:
            more["row_weights"] = row_weights(row_fisher(model, tokens), 0.5)
        pruner = lib.PRUNERS["wanda"].variant if name == "wanda_variant" else lib.PRUNERS[name]
        targets = {matrix.name: 0.5 for matrix in model.matrices}
        lib.prune_model(model, pruner, targets, pattern, tokens, batch_size=4, **more)
        return [(m.weight == 0).cpu() for m in model.matrices], lib.perplexity(model, tokens, batch_size=4)

    def both(architecture, name, pattern=None, rows=False, dtype="float32", **more) -> Callable[[], dict]:
        def run() -> dict:
            case = (architecture, name, pattern or lib.Pattern(), rows)
            key = (*case, *more.items())
            if key not in on_cpu:
                on_cpu[key] = pruned(*case, "cpu", "float32", **more)
            masks, cpu = on_cpu[key]
            other, gpu = pruned(*case, here(), dtype, **more)
            differ = sum(int((a != b).sum()) for a, b in zip(masks, other, strict=True)) / sum(a.numel() for a in masks)
            return {"masks_differ": differ, "ppl_cpu": cpu, "ppl_gpu": gpu}

        return run

    of_four = lib.Pattern(4)
    for name in [*lib.PRUNERS, "wanda_variant"]:
        attempt("tiny", f"llama {name}", both("llama", name))
        if name != "wanda_variant":
            attempt("tiny", f"llama {name} 2:4", both("llama", name, of_four))
    attempt("tiny", "llama sparsegpt asymmetry", both("llama", "sparsegpt", asymmetry=0.5))
    attempt("tiny", "llama alps asymmetry, fisher", both("llama", "alps", rows=True, asymmetry=0.5))
    attempt("tiny", "llama sparsegpt asymmetry, recover", both("llama", "sparsegpt", asymmetry=0.5, recovery=True))
    for architecture in ("mixtral", "qwen3_moe", "gpt2", "gemma2"):
        for name in ("wanda", "sparsegpt"):
            attempt("tiny", f"{architecture} {name}", both(architecture, name))
    attempt("tiny", "mixtral sparsegpt asymmetry", both("mixtral", "sparsegpt", asymmetry=0.5))
    for dtype in ("float16", "bfloat16"):
        for name in ("wanda", "sparsegpt", "alps"):
            attempt("tiny", f"llama {name} {dtype} (CPU float32)", both("llama", name, dtype=dtype))
        attempt("tiny", f"llama wanda recover {dtype}", both("llama", "wanda", dtype=dtype, recovery=True))
        attempt("tiny", f"mixtral wanda {dtype}", both("mixtral", "wanda", dtype=dtype))

    def scores(allocation: str) -> dict:
        found = []
        for device in ("cpu", here()):
            model = lib.load_model(source("llama"), device, "float32")
            asked = ([allocation], tokens, {"owl_m": 5.0}, "layer_wise")
            own, _ = allocation_scores(model, *asked, batch_size=4)[allocation]
            found.append([value if isinstance(value, float) else value[0][500] for value in own.values()])
        return {"largest_difference": max(abs(a - b) / max(1e-9, abs(a)) for a, b in zip(*found, strict=True))}

    for allocation in ("owl", "dlp", "lsa", "lamp"):
        attempt("tiny", f"scores {allocation}", lambda: scores(allocation))

    def spectra() -> dict:
        models = [lib.load_model(source("llama"), device, "float32") for device in ("cpu", here())]
        cpu, gpu = (lib.layer_quality(model, "alpha_peak", "entropy") for model in models)
        return {metric: max(abs(v / gpu[metric][k] - 1) for k, v in cpu[metric].items()) for metric in cpu}

    attempt("tiny", "alpha_peak, entropy: relative difference", spectra)

    def search(dtype: str) -> dict:
        found = []
        for device, kind in (("cpu", "float32"), (here(), dtype)):
            model = lib.load_model(source("llama"), device, kind)

            def prune(targets, asymmetry, windows, model=model, **more):
                pruner, options = lib.PRUNERS["wanda"], {"batch_size": 4, "asymmetry": asymmetry, **more}
                lib.prune_model(model, pruner, targets, lib.Pattern(), windows, **options)

            found.append(Trials(model, prune, tokens, tokens[:4], 2).attribute_loss(0.5, 0.0, None))
        (cpu, cpu_record), (gpu, gpu_record) = found
        both_parts = torch.tensor([[cpu[name], gpu[name]] for name in cpu]).T
        return {
            "correlation": float(torch.corrcoef(both_parts)[0, 1]), "rise_cpu": cpu_record["rise"],
            "rise_gpu": gpu_record["rise"],
        }  # fmt: skip

    for dtype in ("float32", "float16", "bfloat16"):
        attempt("tiny", f"search: parts of the loss, {dtype}", lambda: search(dtype))

    def saved() -> dict:
        model = lib.load_model(source("llama"), here(), "float32")
        lib.save_checkpoint(model, Path(os.environ["SCRATCH"]) / "saved")
        return {}

    attempt("tiny", "save_checkpoint", saved)

    def waits(architecture: str, function: Callable) -> dict:
        """Lines at which the host waited, most first, as torch itself reports them."""
        model = lib.load_model(source(architecture), here(), "float32")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                function(model)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        told = [w for w in caught if "synchroniz" in str(w.message).lower()]
        lines = collections.Counter(f"{Path(w.filename).name}:{w.lineno}" for w in told)
        return {"all": len(told), "by_line": ", ".join(f"{line} {count}" for line, count in lines.most_common(8))}

    def pruning(name: str, pattern) -> Callable:
        def run(model) -> None:
            targets = {matrix.name: 0.5 for matrix in model.matrices}
            lib.prune_model(model, lib.PRUNERS[name], targets, pattern, tokens, batch_size=4)

        return run

    if on_gpu():
        for name in ("wanda", "sparsegpt", "alps"):
            for pattern in (lib.Pattern(), of_four):
                what = f"waits, 21 matrices: {name}{' 2:4' if pattern.group else ''}"
                attempt("tiny", what, lambda: waits("llama", pruning(name, pattern)))
        attempt("tiny", "waits, 36 matrices: mixtral wanda", lambda: waits("mixtral", pruning("wanda", lib.Pattern())))
        lsa = lambda model: allocation_scores(model, ["lsa"], tokens, {}, "layer_wise", batch_size=4)  # noqa: E731
        attempt("tiny", "waits, 21 matrices: lsa", lambda: waits("llama", lsa))


def blocks() -> None:
    source = lib.find_source(str(large_model()))
    tokenizer = lib.load_tokenizer(source)
    model = lib.load_model(source, here(), options.dtype if on_gpu() else "float32", tokenizer)
    windows = lib.calibration_windows("pydoc", tokenizer, nsamples=options.nsamples, seqlen=options.seqlen, seed=0)
    step = None

    def statistics(needs: str) -> dict:
        nonlocal step
        step, memory = None, Memory()
        steps = walk(model, windows, needs, batch_size=max(1, 8192 // options.seqlen))
        first = seconds_of(lambda: next(steps))
        begin = time.perf_counter()
        step = next(steps)
        sync()
        return {"start_and_block_0": first, "propagate_and_block_1": time.perf_counter() - begin, "GB": memory.peak}

    for needs in ("diagonal", "gram"):
        attempt("blocks", f"statistics: {needs}, {options.nsamples} windows", lambda: statistics(needs))
    if step is None:
        return
    of_shape = {}
    for matrix in step.matrices:
        of_shape.setdefault(matrix.shape, matrix)

    def timed(function: Callable) -> dict:
        memory = Memory()
        return {"seconds": seconds_of(function), "GB_above": memory.above}

    for matrix in of_shape.values():
        stats = step.stats[matrix.name]
        for name in [*lib.PRUNERS, "wanda_variant"]:
            pruner = lib.PRUNERS["wanda"].variant if name == "wanda_variant" else lib.PRUNERS[name]
            for pattern in [lib.Pattern()] + [lib.Pattern(4)] * (name != "wanda_variant"):
                what = f"{name}{' 2:4' if pattern.group else ''} {matrix.shape[0]}x{matrix.shape[1]}"
                prune = lambda: pruner.prune(matrix.weight, stats, 0.5, pattern)  # noqa: E731
                if pruner.needs == "gram":  # what the matrices of one input share is computed in the first
                    attempt("blocks", f"{what}, first", lambda: timed(prune), 8)
                attempt("blocks", what, lambda: timed(prune), 8)
        score = lambda: linear_reconstruction_error(matrix.weight, stats.gram)  # noqa: E731
        attempt("blocks", f"score of lsa {matrix.shape[0]}x{matrix.shape[1]}", lambda: timed(score), 8)


def kernels() -> None:
    device, n, m = here(), options.hidden, options.intermediate
    weight = torch.randn(m, n, device=device)
    half = weight.half() if on_gpu() else weight

    def time_it(what: str, function: Callable, repeat: int = 1, needs: float = 5, **more) -> None:
        attempt("kernels", what, lambda: {"seconds": seconds_of(function, repeat), **more}, needs)

    scores = weight.abs()
    time_it(f"lowest_of_matrix, {m}x{n}", lambda: masks.lowest_of_matrix(scores, 0.5), 3)
    again = masks.LowestOfMatrix()
    time_it("  again and again (alps)", lambda: again(scores, 0.5), 3)
    time_it("  as published: a sort of the whole matrix", lambda: scores <= scores.flatten().sort()[0][m * n // 2], 3)
    time_it("lowest_of_rows", lambda: masks.lowest_of_rows(scores, 0.5), 3)
    time_it("lowest_of_rows, uneven", lambda: masks.lowest_of_rows(scores, 0.50003), 3)

    def rows_as_published() -> None:
        order = scores.sort(dim=-1, stable=True)[1]
        torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, : n // 2], True)

    time_it("  as published: a sort of every row", rows_as_published, 3)
    time_it("lowest_of_groups 2 of 4", lambda: masks.lowest_of_groups(scores, 2, 4), 3)

    def groups_as_published() -> None:
        mask = torch.zeros_like(scores, dtype=torch.bool)
        for column in range(0, n, 4):
            mask.scatter_(1, column + scores[:, column : column + 4].topk(2, dim=1, largest=False)[1], True)

    time_it("  as published: four columns at a time", groups_as_published, 1, 10)

    x, gram = torch.randn(8192 if on_gpu() else 256, m, device=device), torch.zeros(m, m, device=device)

    def add() -> dict:
        seconds = seconds_of(lambda: add_gram(gram.zero_(), x), 2)
        add_gram(gram.zero_(), x)
        exact = x[:, :64].double().T @ x.double()
        return {
            "seconds": seconds,
            "error_to_diagonal": float((gram[:64].double() - exact).abs().max() / exact[:, :64].diagonal().mean()),
            "TFLOPS": 5 / 4 * len(x) * m * m / seconds / 1e12,
        }  # fmt: skip

    attempt("kernels", f"add_gram of {len(x)}x{m}", add)
    definite = x.T @ x / len(x)
    definite.diagonal().add_(1)
    for size in (n, m):
        part = definite[:size, :size].contiguous()
        time_it(f"cholesky float32, {size}", lambda: torch.linalg.cholesky_ex(part))
        time_it(f"eigh float32, {size}", lambda: torch.linalg.eigh(part), 1, 20)
        time_it(f"eigvalsh float64, {size}", lambda: torch.linalg.eigvalsh(part.double()), 1, 20)
    time_it(f"squared_singular_values, {m}x{n}", lambda: squared_singular_values(half), 2, 15)
    spectrum = Spectrum(published_precision(half))
    time_it("  alpha_peak of the spectrum", lambda: METRICS["alpha_peak"].score(spectrum), 1, 10)
    time_it("  as published: svdvals float32", lambda: torch.linalg.svdvals(weight), 1, 30)
    if on_gpu():
        time_it("  squared_singular_values on the CPU", lambda: squared_singular_values(half.cpu()), 1, 20)
    host = half.cpu()
    time_it(f"copy of {half.numel() * half.element_size() >> 20} MiB to the host", lambda: half.cpu(), 2)
    time_it("  back", lambda: host.to(device), 2)


def sparse() -> None:
    device, dtype = here(), getattr(torch, options.dtype) if on_gpu() else torch.bfloat16
    n, m = options.hidden, options.intermediate

    def product(share: float, tokens: int) -> dict:
        weight = torch.randn(n, m, device=device).to(dtype).masked_fill_(torch.rand(n, m, device=device) < share, 0)
        layer = SparseLinear(pack_for_device(weight), None, dtype, max_tokens=tokens)
        x = torch.randn(tokens, m, device=device, dtype=dtype)
        exact, repeat = x.double() @ weight.double().T, 50 if on_gpu() else 2
        packed = [lambda own=own: own(x) for own in cold_copies(layer.copy, layer.packed.bytes)]
        dense = [lambda w=w: torch.nn.functional.linear(x, w) for w in cold_copies(weight.clone, weight.nbytes)]
        assert torch.equal(layer.packed.dense(), weight)
        found = {
            "error": float((layer(x).double() - exact).abs().max() / exact.abs().max()),
            "ms": 1e3 * seconds_of_kernels(packed), "dense_ms": 1e3 * seconds_of_kernels(dense),
            "called_ms": 1e3 * seconds_of(packed[0], repeat), "dense_called_ms": 1e3 * seconds_of(dense[0], repeat),
            "bytes_a_weight": layer.packed.bytes / weight.numel(),
        }  # fmt: skip
        layer.max_tokens = 0
        return found | {"unpacked_ms": 1e3 * seconds_of(lambda: layer(x), 2)}

    for share in (0.5, 0.6, 0.7, 0.8, 0.9):
        for tokens in (1, 4) if share == 0.7 else (1,):
            attempt("sparse", f"{share:.0%} of {n}x{m}, {tokens} tokens", lambda: product(share, tokens))

    def of_two_of_four() -> dict:
        weight = torch.randn(n // 64 * 64, m // 64 * 64, device=device).to(dtype)
        weight.view(-1, 4)[:, :2] = 0
        dense = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=device, dtype=dtype)
        dense.weight = torch.nn.Parameter(weight, requires_grad=False)
        assert cuda.is_two_of_four(weight)
        layer, x = cuda.semi_structured(dense, weight), torch.randn(1, weight.shape[1], device=device, dtype=dtype)
        exact = x.double() @ weight.double().T
        return {
            "error": float((layer(x).double() - exact).abs().max() / exact.abs().max()),
            "ms": 1e3 * seconds_of(lambda: layer(x), 50), "dense_ms": 1e3 * seconds_of(lambda: dense(x), 50),
        }  # fmt: skip

    if on_gpu():
        attempt("sparse", "2:4, torch's semi-structured", of_two_of_four)

    def generated() -> dict:
        source = Path(os.environ["SCRATCH"]) / "half"
        model = lib.LanguageModel(tiny_model("llama"))
        for matrix in model.matrices:
            matrix.write(matrix.weight.half().float().masked_fill(torch.rand(matrix.shape) < 0.6, 0))
        lib.save_checkpoint(model, source)
        tokens = tiny_tokens(1, 12)
        asked = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
        expected = model.model.generate(tokens, **asked)
        found = lib.sparse_model(source, device=options.device, dtype="float32", threshold=0.5)
        return {"same_text": torch.equal(found.generate(tokens.to(here()), **asked).cpu(), expected)}

    attempt("sparse", "llama generates, static cache", generated)

    def written() -> dict:
        """Milliseconds a token, and seconds of the first text, in which what is compiled is compiled."""
        model, count, found = lib.LanguageModel(large_llama().eval()), 32, {}
        for matrix in model.matrices:
            matrix.write(matrix.weight.masked_fill(torch.rand(matrix.shape, device=device) < 0.7, 0))
        tokens = torch.randint(options.vocabulary, (1, 16), device=device)
        for how in ("dense", "dense, static", "packed", "packed, static"):
            if how == "packed":
                lib.sparse_model(model, threshold=0.5)
            asked = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
            asked |= {"cache_implementation": "static"} if "static" in how else {}
            write = lambda asked=asked: model.model.generate(tokens, **asked)  # noqa: E731
            with torch.no_grad(), without_cudnn_attention():
                found[f"{how}, first"], found[how] = seconds_of(write), 1e3 * seconds_of(write, 2) / count
        return found

    def own() -> dict:
        model = lib.LanguageModel(large_llama().eval())
        return {"ms_a_token": 1e3 * seconds_of(lambda: sample_windows(model, 8, seqlen=64)) / 64}

    attempt("sparse", f"generate, {options.blocks} blocks, 70%", written, 45)
    attempt("sparse", f"the model's own text, {options.blocks} blocks", own, 15)


def commands() -> None:
    base = {
        "model": str(large_model()), "sparsity_ratio": 0.5, "calib_data": "pydoc", "eval_data": "pydoc",
        "nsamples": options.nsamples, "seqlen": options.seqlen, "eval_windows": options.windows, "save": "results",
        "cache_dir": "cache", "device": options.device,
    }  # fmt: skip

    def line() -> dict:
        flags = [f"--{key}={value}" for key, value in base.items() if key != "sparsity_ratio"]
        flags += ["--prune_method=wanda_ww", "--sparsity_ratio=0.7", "--eval_dense", "--save_model=pruned"]
        done = subprocess.run(
            [sys.executable, str(ROOT / "main.py"), *flags], capture_output=True, text=True, timeout=max(20, left())
        )
        if done.returncode:
            raise RuntimeError(f"exit {done.returncode}: {done.stderr.strip()[-300:]}")
        return {"printed": " | ".join(part.strip() for part in done.stdout.split("\n") if part.strip())[:200]}

    def command(**flags) -> Callable[[], dict]:
        def run() -> dict:
            memory = Memory()
            record = main.run(lib.RunConfig(**{**base, "quiet": True, **flags}))
            perplexity = record["perplexity"] or {}
            return {
                "ppl": perplexity.get("pruned"), "achieved": round((record["sparsity"] or {}).get("achieved", 0), 4),
                "GB": round(memory.peak, 2), "events": len(record["events"]),
                "stages": {stage: round(s, 1) for stage, s in record["seconds"].items() if s >= 0.05},
            }  # fmt: skip

        return run

    few = {"nsamples": max(8, options.nsamples // 4)}
    attempt("commands", "main.py wanda_ww 0.7 --save_model", line, 30)
    for what, flags in {
        "wanda": {"eval_dense": True},
        "sparsegpt": {},
        "sparsegpt 2:4": {"sparsity_type": "2:4"},
        "magnitude_ww": {},
        "wanda --stream": {"stream": True, "save_model": "streamed"},
        "wanda_owl": {},
        "wanda --recover block": {"recover": "block", **few},
        "wanda --recover model": {"recover": "model", **few},
        "sparsegpt --fisher --asymmetry": {"fisher": 0.5, "asymmetry": 0.5, **few},
        "alps": {},
        "wanda_lsa": few,
        "wanda_search": few,
        "alps_search --asymmetry --fisher": {"mapping_type": "layer_wise", "fisher": 0.5, "asymmetry": 0.5, **few},
        "analyze_only": {"analyze_only": True, "ww_metric": ("alpha_peak", "stable_rank"), "cache_dir": "another"},
        "wanda --calib_data self": {"calib_data": "self", "seqlen": min(256, options.seqlen), **few},
    }.items():
        method = "" if what == "analyze_only" else what.split()[0]
        attempt("commands", what, command(prune_method=method, **flags), 15)


if __name__ == "__main__":
    options = parser.parse_args()
    options.out = options.out.resolve()
    if not options.phase:
        parent()
        sys.exit()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "script")]
    import torch
    import transformers
    from tiny import tiny_model, tiny_tokens

    import lib
    import main
    from lib import masks
    from lib.allocation.activations import linear_reconstruction_error
    from lib.attention import without_cudnn_attention
    from lib.cli import set_up_logging
    from lib.esd import Spectrum, published_precision, squared_singular_values
    from lib.fisher import row_fisher, row_weights
    from lib.metrics import METRICS
    from lib.quality import allocation_scores
    from lib.sampling import sample_windows
    from lib.sequential import walk
    from lib.sparse import SparseLinear, cuda, pack_for_device
    from lib.sparse.choice import cold_copies
    from lib.stats import add_gram
    from lib.trials import Trials

    set_up_logging(quiet=True)
    globals()[options.phase]()
