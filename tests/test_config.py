"""RunConfig: published defaults, names of methods and runs, and what is derived from the flags."""

import dataclasses
import re

import pytest

from lib import shared_flags
from lib.allocation import ALLOCATIONS
from lib.config import TOKENS_AT_ONCE, RunConfig, prune_methods
from lib.errors import RunError
from lib.pruners import PRUNERS

PUBLISHED = {
    "cache_dir": "llm_weights", "ww_metric": ("alpha_peak",), "epsilon": 0.2, "nsamples": 128, "seed": 0,
    "mapping_type": "block_wise", "sparsity_type": "unstructured", "use_variant": False, "eval_zero_shot": False,
}  # fmt: skip

# Another value for every field that decides a result, and for those that do not.
DECIDING = {
    "prune_method": "sparsegpt_ww", "sparsity_ratio": 0.6, "sparsity_type": "4:8", "use_variant": True,
    "ww_metric": "alpha_mid", "epsilon": 0.3, "mapping_type": "layer_wise", "calib_data": "pydoc", "nsamples": 64,
    "seqlen": 512, "seed": 1, "eval_wikitext": False, "eval_data": "ptb", "eval_windows": 8, "batch_size": 2,
    "device": "cpu", "dtype": "bfloat16", "trust_remote_code": True, "ww_metric_cache": "scores",
    "eval_dense": True, "analyze_only": True, "stream": True, "owl_lambda": 0.1, "owl_m": 3.0, "dlp_alpha": 0.1,
    "lsa_alpha": 0.1, "ramp_beta": 0.02, "asymmetry": 0.25, "search_strength": 1.0, "recover": "block",
    "recover_nsamples": 300, "fisher": 0.5, "save_dtype": "bfloat16", "add_bos": "every", "eval_zero_shot": True,
    "tasks": ("piqa",), "task_limit": 9, "plan_only": True, "sparsities": "half.json", "distill": 0.3,
    "recover_self": 8, "calib_self": 4,
}  # fmt: skip
# What else has to be given for a field to be read, where the method is wanda_ww.
READ_WITH = {
    **{name: {"prune_method": "sparsegpt_ww"} for name in ("asymmetry", "fisher")},
    **{name: {"prune_method": "wanda_owl"} for name in ("owl_lambda", "owl_m")},
    **{f"{name}_alpha": {"prune_method": f"wanda_{name}"} for name in ("dlp", "lsa")},
    "ramp_beta": {"prune_method": "wanda_ramp"}, "search_strength": {"prune_method": "wanda_search"},
    "distill": {"recover": "model"}, **{name: {"recover": "block"} for name in ("recover_nsamples", "recover_self")},
    "sparsities": {"prune_method": "wanda_file", "sparsities": "less.json"},
    **{name: {"eval_zero_shot": True} for name in ("tasks", "task_limit")},
}  # fmt: skip
INDIFFERENT = {
    "cache_dir": "elsewhere", "save": "out", "save_model": "pruned", "quiet": True, "plot": True,
    "activation_memory": 2.0, "restart": True,
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """All that RunConfig looks for in a model's folder."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/config.json").write_text("{}")
    return str(tmp_path / "llama")


@pytest.fixture
def configure(model):
    """RunConfig with the flags that have no default filled in."""
    return lambda **flags: RunConfig(**{"model": model, "prune_method": "wanda_ww", "sparsity_ratio": 0.5, **flags})


def test_defaults_are_the_published_ones(configure):
    config = configure()
    assert {name: getattr(config, name) for name in PUBLISHED} == PUBLISHED


def test_frozen(configure):
    config = configure()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


@pytest.mark.parametrize("name", ["model", "prune_method", "sparsity_ratio"])
def test_three_flags_have_no_default(name, model):
    flags = {"model": model, "prune_method": "wanda", "sparsity_ratio": 0.5}
    del flags[name]
    with pytest.raises(RunError, match=f"^--{name}: is missing"):
        RunConfig(**flags)


@pytest.mark.parametrize("flag", ["save", "cache_dir", "save_model", "calib_data", "WW_metric_cache"])
def test_a_value_is_not_empty(flag, configure):
    with pytest.raises(RunError, match=f"^--{flag}: is empty"):
        configure(**{flag.lower(): ""})


@pytest.mark.parametrize("edge", [{"sparsity_ratio": 0.0}, {"epsilon": 0.0}, {"epsilon": 1.0}, {"seqlen": 2}])
def test_values_at_the_edge_are_accepted(edge, configure):
    config = configure(**edge)
    assert {name: getattr(config, name) for name in edge} == edge


# ---------------------------------------------------------------- methods


def test_methods_are_every_pruner_with_every_allocation():
    methods = prune_methods()
    assert sorted(methods.values()) == sorted((pruner, allocation) for pruner in PRUNERS for allocation in ALLOCATIONS)
    for name, (pruner, allocation) in methods.items():
        assert name == (pruner if allocation == "uniform" else f"{pruner}_{allocation}")


def test_published_methods_exist():
    published = {"magnitude", "wanda", "sparsegpt", "magnitude_ww", "wanda_ww", "sparsegpt_ww"}
    assert published <= set(prune_methods())


def test_a_new_pruner_and_a_new_allocation_join(monkeypatch, configure):
    monkeypatch.setitem(PRUNERS._entries, "alps", PRUNERS["wanda"])
    monkeypatch.setitem(ALLOCATIONS._entries, "owl", ALLOCATIONS["ww"])
    assert {"alps", "alps_ww", "alps_owl", "wanda_owl"} <= set(prune_methods())
    config = configure(prune_method="alps_owl")
    assert (config.pruner, config.allocation) == ("alps", "owl")


@pytest.mark.parametrize(
    ("method", "pruner", "allocation"), [("magnitude", "magnitude", "uniform"), ("sparsegpt_ww", "sparsegpt", "ww")]
)
def test_pruner_and_allocation_of_a_method(method, pruner, allocation, configure):
    config = configure(prune_method=method)
    assert (config.pruner, config.allocation) == (pruner, allocation)


def test_windows_of_recovery(configure):
    """Beside --nsamples as many again, or what is asked for; only a block's are held while blocks are pruned."""
    assert (configure(nsamples=16).recovery_windows, configure(nsamples=16).streamed_windows) == (0, 16)
    assert configure(recover="model", nsamples=16).recovery_windows == 16
    both = configure(recover=("model", "block"), nsamples=16, recover_nsamples=20)
    assert (both.recover, both.recovery_windows, both.streamed_windows) == (("block", "model"), 4, 20)
    assert configure(recover="model", nsamples=16).streamed_windows == 16
    assert configure(prune_method="magnitude", recover="block").calibrated
    assert configure(recover_nsamples=1).unused_flags() == ["--recover_nsamples"]


def test_loss_of_recovery(configure):
    """The dense model's own text has nothing to tell beside the distribution that it is drawn from."""
    assert configure(recover="model").distill == shared_flags.DISTILL < 1
    assert configure(recover="model", calib_data="self").distill == 1
    assert configure(recover=("block", "model"), calib_data="self", distill=0.75).distill == 0.75
    assert configure(recover="block", distill=0.75).unused_flags() == ["--distill"]
    nothing = configure(prune_method="magnitude", sparsity_ratio=0.0, recover="model", recover_self=8)
    assert set(nothing.unused_flags()) == {"--recover", "--recover_self"}
    assert not nothing.samples_text
    nothing = configure(prune_method="magnitude", sparsity_ratio=0.0, recover=("block", "model"))
    assert (nothing.recovers_blocks, nothing.distils, nothing.calibrated) == (False, False, False)
    assert (configure().distill, configure(recover="model", plan_only=True).distill) == (None, None)
    with pytest.raises(RunError, match=r"^--distill 1.5: must lie in \[0, 1\]"):
        configure(recover="model", distill=1.5)


def test_windows_of_the_models_own(configure):
    """To calibrate on, held out where something is chosen, and further ones that recovery trains on."""
    assert configure(calib_self=5).sampled_windows == (5, 0, 0)
    assert configure(prune_method="wanda_search", calib_self=5).sampled_windows == (5, 3, 0)
    assert configure(calib_self=5, recover="block", recover_self=7).sampled_windows == (5, 0, 2)
    assert configure(recover="model", recover_self=7).sampled_windows == (0, 0, 7)
    assert configure(calib_self=5, recover_self=2).sampled_windows == (5, 0, 0)  # nothing is recovered
    assert configure(prune_method="magnitude", calib_self=5).unused_flags() == ["--calib_self"]
    assert configure(calib_self=5).streamed_windows == 128 + 5
    assert configure(calib_self=5, recover="block", recover_self=7).streamed_windows == 256 + 7
    by_default, told = (configure(calib_self=5, recover="model", **more) for more in ({}, {"recover_self": 5}))
    assert by_default.digest == told.digest


def test_a_plan_of_a_stand_in_reads_no_fisher(configure):
    options = {"prune_method": "alps_search", "fisher": 0.5, "plan_only": True}
    assert configure(**options).unused_flags() == ["--fisher"]
    assert not configure(**options).weighs_rows
    assert all(configure(**options, asymmetry=value).weighs_rows for value in ("auto", 0.5))


def test_runs_from_before_a_flag_keep_their_names(configure):
    """What such a run did is what the flag's `before` says, and of that value the flag is no part of a name."""
    config = configure(recover="model", distill=1)
    assert "distill" not in config.result_flags()
    assert configure(recover="model").result_flags()["distill"] < 1
    assert "distill" not in configure(recover="block", distill=0.3).result_flags()
    values = {name: value for name, value in dataclasses.asdict(config).items() if name != "distill"}
    assert RunConfig.recorded(values).distill == 1
    assert RunConfig.recorded(values).digest == config.digest


# ---------------------------------------------------------------- the run's name


@pytest.mark.parametrize(
    ("flags", "readable"),
    [
        ({"sparsity_ratio": 0.7}, "wanda_ww-0.7-alpha_peak-eps0.2-seed0"),
        ({"prune_method": "wanda", "seed": 3}, "wanda-0.5-seed3"),
        ({"epsilon": "auto"}, "wanda_ww-0.5-alpha_peak-epsauto-seed0"),
        ({"prune_method": "alps", "asymmetry": "auto"}, "alps-0.5-asymmetryauto-seed0"),
        (
            {"prune_method": "alps", "asymmetry": 0.25, "search_strength": 1.0, "fisher": 0.5, "recover": "block"},
            "alps-0.5-asymmetry0.25-fisher0.5-recover_block-seed0",
        ),
        ({"prune_method": "wanda", "recover": ("model", "block")}, "wanda-0.5-recover_block_model-seed0"),
        ({"prune_method": "magnitude", "sparsity_type": "2:4"}, "magnitude-0.5-2of4-seed0"),
    ],
)
def test_run_name_is_readable(flags, readable, configure):
    assert re.fullmatch(re.escape(readable) + "-[0-9a-f]{8}", configure(**flags).run_name)


@pytest.mark.parametrize("name", DECIDING)
def test_run_name_tells_what_decides(name, configure, tmp_path, monkeypatch):
    for path, share in ("half.json", 0.5), ("less.json", 0.4):
        (tmp_path / path).write_text(f'{{"*": {share}}}')
    monkeypatch.chdir(tmp_path)
    others = {"save_model": "pruned", **READ_WITH.get(name, {})}  # which a streamed run needs
    assert configure(**others | {name: DECIDING[name]}).run_name != configure(**others).run_name


@pytest.mark.parametrize("name", [name for name in READ_WITH if name != "sparsities"])
def test_a_flag_that_is_not_read_does_not_tell_runs_apart(name, configure):
    """Nor one that nothing after a plan reads."""
    unread = {name: DECIDING[name]}
    if name not in ("asymmetry", "fisher"):  # which are refused where they mean nothing
        assert configure(**unread).run_name == configure().run_name
    plan = {"prune_method": "sparsegpt_ww", "plan_only": True}
    assert configure(**plan, **unread).run_name == configure(**plan).run_name


def test_run_name_tells_models_apart(configure, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text("{}")
    assert configure(model=str(tmp_path / "other")).run_name != configure().run_name


def test_run_name_is_the_same_from_every_folder(configure, tmp_path, monkeypatch):
    name = configure().run_name
    monkeypatch.chdir(tmp_path)
    assert configure(model="llama").run_name == name


@pytest.mark.parametrize("name", INDIFFERENT)
def test_run_name_leaves_out_what_does_not_decide(name, configure):
    assert configure(**{name: INDIFFERENT[name]}).run_name == configure().run_name


def test_every_field_is_known_to_decide_or_not():
    known = {*DECIDING, *INDIFFERENT, "model"}
    assert {item.name for item in dataclasses.fields(RunConfig)} == known


# ---------------------------------------------------------------- derived from the flags


@pytest.mark.parametrize(("pattern", "ratio"), [("2:4", 0.5), ("1:4", 0.25), ("4:8", 0.5), ("7:8", 0.875)])
def test_sparsity_comes_from_the_pattern(pattern, ratio, configure):
    config = configure(sparsity_type=pattern, sparsity_ratio=None)
    assert config.sparsity == ratio
    assert config.pattern.group == int(pattern[2:])


def test_sparsity_is_the_ratio_where_given(configure):
    assert configure(sparsity_ratio=0.7).sparsity == 0.7
    assert configure(sparsity_ratio=0.7).pattern.group is None
    assert configure(sparsity_ratio=0.6, sparsity_type="2:4").sparsity == 0.6


@pytest.mark.parametrize(("method", "ratio"), [("wanda", 0.51), ("wanda", 0.0), ("wanda_ww", 0.25), ("wanda_ww", 0.75)])
def test_ratio_against_the_pattern(method, ratio, configure):
    with pytest.raises(RunError, match=r"^--sparsity_ratio .*--sparsity_type 2:4"):
        configure(prune_method=method, sparsity_ratio=ratio, sparsity_type="2:4")


@pytest.mark.parametrize(
    ("seqlen", "limit", "window"),
    [(None, None, 2048), (None, 4096, 2048), (None, 512, 512), (64, 64, 64), (4096, None, 4096), (4096, 8192, 4096)],
)
def test_window(seqlen, limit, window, configure):
    assert configure(seqlen=seqlen).window(limit) == window


def test_window_beyond_the_limit(configure):
    with pytest.raises(RunError, match=r"^--seqlen 513: .*512"):
        configure(seqlen=513).window(512)


@pytest.mark.parametrize(
    ("batch_size", "seqlen", "batch"), [(None, 2048, 2), (None, 512, 8), (None, 8192, 1), (3, 512, 3), (1, 16, 1)]
)
def test_batch(batch_size, seqlen, batch, configure, monkeypatch):
    monkeypatch.setitem(TOKENS_AT_ONCE, "cpu", 4096)
    assert configure(device="cpu", batch_size=batch_size).batch(seqlen) == batch


ALLOCATING = {"ww_metric": "alpha_mid", "ww_metric_cache": "scores", "epsilon": 0.3, "mapping_type": "mixed"}
CALIBRATING = {"calib_data": "pydoc", "nsamples": 4}
SCORING_FLAGS = {"--WW_metric", "--WW_metric_cache", "--epsilon"}
EVALUATING = {"eval_data": "pydoc", "eval_windows": 2}


@pytest.mark.parametrize(
    ("method", "evaluated", "unread"),
    [
        ("wanda_ww", True, set()),
        ("wanda_ww", False, {"--eval_data", "--eval_windows"}),
        ("sparsegpt", True, {"--WW_metric", "--WW_metric_cache", "--epsilon", "--mapping_type"}),
        ("magnitude_dlp", True, SCORING_FLAGS),
        ("magnitude_lamp", True, {*SCORING_FLAGS, "--mapping_type", "--calib_data", "--nsamples"}),
        ("magnitude_ww", True, {"--calib_data", "--nsamples"}),
    ],
)
def test_flags_without_effect(method, evaluated, unread, configure):
    changed = {**ALLOCATING, **CALIBRATING, **EVALUATING, "seed": 1, "batch_size": 1}
    assert set(configure(prune_method=method, eval_wikitext=evaluated, **changed).unused_flags()) == unread


def test_flags_without_effect_on_an_analysis(configure):
    config = configure(analyze_only=True, ww_metric=("alpha", "entropy"), plot=True, nsamples=4, stream=True)
    assert set(config.unused_flags()) == {"--prune_method", "--sparsity_ratio", "--nsamples", "--stream"}


def test_an_analysis_needs_a_model_only(model):
    config = RunConfig(model=model, analyze_only=True, ww_metric="entropy")
    assert config.ww_metric == ("entropy",)
    assert config.run_name.startswith("analysis-llama-")


def test_a_picture_reads_the_metric(configure):
    assert configure(prune_method="wanda", ww_metric="alpha_mid", plot=True).unused_flags() == []


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_defaults_are_never_reported(method, configure):
    assert configure(prune_method=method, eval_wikitext=False).unused_flags() == []
