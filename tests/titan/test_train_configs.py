"""train_configs/: parsed by torchtitan's own parser, and built at their real numbers of ranks."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from forked import python
from torchtitan.config import ConfigManager
from torchtitan.protocols.train_spec import get_train_spec

from titan_adam_mini.titan.job_config import AdamMini
from titan_adam_mini.titan.knobs import Knobs, read_knobs

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "train_configs").glob("*.toml"))


def parse(name: str, *further: str) -> Any:
    return ConfigManager().parse_args(["--job.config_file", str(ROOT / "train_configs" / f"{name}.toml"), *further])


def test_all_are_there() -> None:
    llama2 = ["llama2_13b", "llama2_7b", "llama2_scaling_law"]
    assert [file.stem for file in FILES] == ["debug_model", *llama2, "llama3_405b", "llama3_70b", "llama3_8b"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_torchtitan_parses_it(file: Path) -> None:
    config = parse(file.stem)
    assert config.experimental.custom_import == "titan_adam_mini.titan"
    assert config.job.custom_config_module == "titan_adam_mini.titan.job_config"
    assert config.optimizer.name == "AdamMini"
    value_blocks = "tensor" if file.stem in ("llama2_7b", "llama2_13b") else "neuron"
    assert config.optimizer.adam_mini == AdamMini(value_blocks=value_blocks)
    assert read_knobs(config.optimizer) == Knobs(value_blocks=value_blocks)
    assert config.model.flavor in get_train_spec(config.model.name).model_args
    section = file.read_text().split("\n[optimizer.adam_mini]\n")[1].split("\n[")[0]
    assert set(re.findall(r"^(\w+) = ", section, re.MULTILINE)) == set(vars(AdamMini())), "every knob is shown"


def test_every_size_of_the_scaling_law_has_the_papers_tokens() -> None:
    """The file itself and the lines in its comments, given to torchtitan's parser: arXiv 2406.16793, table 4."""
    text = (ROOT / "train_configs" / "llama2_scaling_law.toml").read_text()
    lines = re.findall(r"^#   (--model.flavor .*)$", text, re.MULTILINE)
    tokens = {}
    for line in ["", *lines]:
        config = parse("llama2_scaling_law", *line.split())
        training = config.training
        tokens[config.model.flavor] = round(
            training.steps * training.global_batch_size * training.seq_len / 1e9, ndigits=2
        )
        assert config.lr_scheduler.warmup_steps == training.steps // 100
        assert config.optimizer.lr == (2e-4 if config.model.flavor == "llama2_1B" else 6e-4)
        assert (training.global_batch_size, training.local_batch_size) == (256, 256 // 4), "on 4 GPUs at once"
    named = {"39M": 1.02, "67M": 1.76, "102M": 2.67, "162M": 4.25, "271M": 7.10, "1B": 26.21}
    assert tokens == {f"llama2_{size}": billions for size, billions in named.items()}


def build(name: str, ranks: int, rank: int, folder: Path) -> tuple[dict[str, Any], list[list[str]]]:
    """What build_on_meta.py saw, and its table as rows of cells."""
    script = Path(__file__).with_name("build_on_meta.py")
    words = [str(script), str(ranks), str(rank), "--job.config_file", str(ROOT / "train_configs" / f"{name}.toml")]
    program = f"import runpy, sys; sys.argv = {words!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    ((status, printed),) = python([program], folder, timeout=300)
    assert status == 0, printed
    lines = printed.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("{"))
    print(f"{name}, rank {rank} of {ranks}: {lines[first]}")
    return json.loads(lines[first]), [re.split(r"\s{2,}", line) for line in lines[first + 1 :]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "parameters", "mesh", "exchanged"),
    [
        ("llama2_7b", 2, 6_738_415_616, (2, 1), "1,590,412"),
        pytest.param("llama2_13b", 4, 13_015_864_320, (4, 1), "2,479,532", marks=pytest.mark.nightly),
        ("llama2_scaling_law", 4, 38_738_304, (4, 1), "50,988"),
        ("llama3_8b", 8, 8_030_261_248, (8, 1), "1,066,124"),
        pytest.param("llama3_8b", 64, 8_030_261_248, (64, 1), "1,721,484", marks=pytest.mark.nightly),
        ("llama3_70b", 64, 70_553_706_496, (8, 8), "5,977,108"),
        pytest.param("llama3_405b", 128, 405_853_388_800, (16, 8), "17,685,396", marks=pytest.mark.nightly),
    ],
)
def test_built_at_its_real_number_of_ranks(
    tmp_path: Path, name: str, ranks: int, parameters: int, mesh: tuple[int, int], exchanged: str
) -> None:
    text = (ROOT / "train_configs" / f"{name}.toml").read_text()
    assert ranks == 8 or f"sized for {ranks} GPUs" in text, "the file's first line says for how many GPUs it is"
    seen, table = build(name, ranks, ranks - 1, tmp_path)
    assert (seen["parameters"], seen["dp_shard"], seen["tp"]) == (parameters, *mesh)
    assert 0.99 * parameters / ranks <= seen["local"] <= 1.01 * parameters / ranks
    args = get_train_spec("llama3").model_args[parse(name).model.flavor]
    rows = {row[0]: row for row in table}
    head_dim = args.dim // args.n_heads
    for weight, heads in (("wq", args.n_heads), ("wk", args.n_kv_heads)):
        row = rows[f"layers.*.attention.{weight}.weight"]
        assert row[1].split()[0] == str(args.n_layers), row
        assert any(f"{heads}x{head_dim} * 1x{args.dim}" in cell for cell in row), row
    assert table[-1][-1] == exchanged, "bytes per step"
    assert seen["plan_s"] < 30
