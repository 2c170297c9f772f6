"""What could not run is refused by `plan`, in a sentence on standard error, with status 1: before there are nodes."""

from __future__ import annotations

import pytest
from real_memory import CONFIG

from titan_adam_mini.cli import main

SMALL = ["--experimental.custom_import", "small_flavors", "--model.flavor"]
TP, PP, EP = (f"--parallelism.{name}_parallel_degree" for name in ("tensor", "pipeline", "expert"))
BATCH = "--training.local_batch_size"
QUICK = [
    (["--ngpu", "2", *SMALL, "nasty", "--model.name", "mystery"], "mystery (3, 4)"),
    (["--ngpu", "3", TP, "2"], "the mesh does not divide 3 ranks: tensor_parallel_degree 2 make 2"),
    (
        ["--ngpu", "2", "--optimizer.early_step_in_backward"],
        "early_step_in_backward = true is not supported by AdamMini",
    ),
    (["--ngpu", "4", BATCH, "2", "--training.global_batch_size", "12"], "not a multiple of local_batch_size 2 x 4"),
    (["--ngpu", "2", TP, "2"], "tensor_parallel_degree 2 does not divide the 5 attention heads"),
]
OTHERS = [
    (["--ngpu", "2", "--optimizer.adam_mini.roles", "*.wq.weight=nonsense"], "nonsense"),
    (["--ngpu", "2", "--optimizer.adam_mini.roles", "*.wx.weight=norm"], "matches no parameter"),
    (["--ngpu", "2", "--optimizer.lr", "-1"], "Invalid lr"),
    (["--ngpu", "2", "--fault_tolerance.enable"], "torchft changes the set of replicas"),
    (["--ngpu", "8", TP, "2", "--parallelism.data_parallel_shard_degree", "2"], "the mesh has 4 ranks and the run 8"),
    (["--ngpu", "2", "--parallelism.data_parallel_shard_degree", "0"], "shard_degree = 0 is not possible"),
    (["--ngpu", "2", "--parallelism.context_parallel_degree", "0"], "context_parallel_degree = 0 is not possible"),
    (["--ngpu", "4", *SMALL, "nasty_moe", "--model.name", "qwen3", EP, "4"], "does not divide 6 experts"),
    (["--ngpu", "4", *SMALL, "nasty_moe", "--model.name", "qwen3", EP, "3"], "does not divide the 4 ranks"),
    (["--ngpu", "2", BATCH, "0"], "local_batch_size = 0 is not possible"),
    (
        ["--ngpu", "4", TP, "2", "--model.flavor", "debugmodel", "--training.seq_len", "101"],
        "Sequence length 101",
    ),
    (["--ngpu", "4", *SMALL, "nasty", TP, "2"], "does not divide the 343 rows of layers.0.feed_forward.w1.weight"),
    (
        ["--ngpu", "4", *SMALL, "odd", TP, "2", "--optimizer.adam_mini.momentum_dtype", "int8"],
        "AdamMini cannot plan 'layers.0.attention.wo.weight': momentum_dtype int8 has one scale per run of 128 columns",
    ),
    (["--ngpu", "6", *SMALL, "odd", TP, "2", "--checkpoint.enable"], "would mix up the rows of tok_embeddings.weight"),
    (["--ngpu", "2", "--checkpoint.enable", "--checkpoint.keep_latest_k", "1"], "keep 2 or more, or 0 for all"),
    (["--ngpu", "2", "--checkpoint.initial_load_path", "x"], "has no effect without checkpoint.enable = true"),
    (["--ngpu", "2", PP, "2", BATCH, "1"], "Number of microbatches (1) must be greater than or equal"),
    (
        ["--ngpu", "2", PP, "2", BATCH, "3", "--parallelism.pipeline_parallel_microbatch_size", "2"],
        "must be divisible by microbatch_size 2",
    ),
    (["--ngpu", "2", PP, "2", BATCH, "2", "--parallelism.pipeline_parallel_schedule", "nonsense"], "nonsense"),
    (["--ngpu", "16", PP, "16", BATCH, "16"], "cannot be greater than effective layers"),
    (
        ["--ngpu", "4", "--parallelism.data_parallel_replicate_degree", "2", TP, "2", "--model.flavor", "debugmodel"],
        "DDP has not supported > 1D parallelism",
    ),
    (["--ngpu", "2", "--activation_checkpoint.mode", "memory_budget"], "needs compile.enable = true"),
    (
        ["--ngpu", "2", TP, "2", "--model.flavor", "debugmodel", "--parallelism.enable_async_tensor_parallel"],
        "enable_async_tensor_parallel needs compile.enable = true",
    ),
    (["--ngpu", "2", "--model.converters", "nonsense"], "model.converters has 'nonsense'"),
    (["--ngpu", "2", "--model.name", "qwen3", "--model.flavor", "debugmodel"], "output.weight is tied to a weight of"),
    (["--ngpu", "2", "--training.dataset", "nonsense"], "training.dataset 'nonsense' is unknown"),
    (["--ngpu", "2", "--model.flavor", "huge"], "no flavor 'huge': it has"),
    (["--ngpu", "2", "--model.name", "nonsense"], "nonsense"),
    (["--ngpu", "2", "--experimental.custom_import", "no_module"], "'no_module' cannot be imported"),
    (["--ngpu", "2", "--no.such.flag", "2"], "torchtitan does not take these arguments"),
]


@pytest.mark.parametrize(
    ("words", "told"),
    [*QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in OTHERS)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_sentence(words: list[str], told: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(CONFIG), "--json", *words])
    assert ended.value.code == 1
    seen = capfd.readouterr()
    assert seen.out == ""
    error = seen.err.partition("titan-adam-mini: ")[2]
    assert told in " ".join(error.split()) and "Traceback" not in seen.err, seen.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give CONFIG.toml or --job.config_file X"),
        (["none.toml", "--ngpu", "2"], "there is no configuration none.toml"),
        ([str(CONFIG)], "give --ngpu N, or set NGPU=N"),
        ([str(CONFIG), "--ngpu", "0"], "must be a positive number, not 0"),
        ([str(CONFIG), "--ngpu", "2", "--json", "no/such/folder/x.json"], "its folder does not exist"),
        ([str(CONFIG), "--ngpu", "2", "--json", "/tmp"], "--json /tmp is a folder: name a file in it"),
    ],
)
def test_own_flags(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *words])
    assert ended.value.code == 1 and told in capsys.readouterr().err


@pytest.mark.slow
def test_what_runs_without_checkpoints_is_planned(capfd: pytest.CaptureFixture[str]) -> None:
    """Neither the refusal of checkpoints nor of int8 concerns a run that has neither."""
    main(["plan", str(CONFIG), "--json", "--ngpu", "6", *SMALL, "odd", TP, "2"])
    assert '"worth_it": false' in capfd.readouterr().out
