"""train_configs/: parsed by torchtitan's own parser, and built at their real numbers of ranks."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torchtitan.config import ConfigManager
from torchtitan.protocols.train_spec import get_train_spec

from titan_adam_mini.titan.job_config import AdamMini
from titan_adam_mini.titan.knobs import Knobs, read_knobs

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "train_configs").glob("*.toml"))


def parse(name: str) -> Any:
    return ConfigManager().parse_args(["--job.config_file", str(ROOT / "train_configs" / f"{name}.toml")])


def test_all_four_are_there() -> None:
    assert [file.stem for file in FILES] == ["debug_model", "llama3_405b", "llama3_70b", "llama3_8b"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_torchtitan_parses_it(file: Path) -> None:
    config = parse(file.stem)
    assert config.experimental.custom_import == "titan_adam_mini.titan"
    assert config.job.custom_config_module == "titan_adam_mini.titan.job_config"
    assert config.optimizer.name == "AdamMini"
    assert config.optimizer.adam_mini == AdamMini()
    assert read_knobs(config.optimizer) == Knobs()
    assert config.model.flavor in get_train_spec(config.model.name).model_args
    section = file.read_text().split("\n[optimizer.adam_mini]\n")[1].split("\n[")[0]
    assert set(re.findall(r"^(\w+) = ", section, re.MULTILINE)) == set(vars(AdamMini())), "every knob is shown"


def build(name: str, ranks: int, rank: int) -> tuple[dict[str, Any], list[list[str]]]:
    """What build_on_meta.py saw, and its table as rows of cells."""
    ran = subprocess.run(
        [
            *(sys.executable, str(Path(__file__).with_name("build_on_meta.py")), str(ranks), str(rank)),
            *("--job.config_file", str(ROOT / "train_configs" / f"{name}.toml")),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("{"))
    print(f"{name}, rank {rank} of {ranks}: {lines[first]}")
    return json.loads(lines[first]), [re.split(r"\s{2,}", line) for line in lines[first + 1 :]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "parameters", "mesh", "exchanged"),
    [
        ("llama3_8b", 8, 8_030_261_248, (8, 1), "1,066,124"),
        ("llama3_8b", 64, 8_030_261_248, (64, 1), "1,721,484"),
        ("llama3_70b", 64, 70_553_706_496, (8, 8), "5,977,108"),
        ("llama3_405b", 128, 405_853_388_800, (16, 8), "17,685,396"),
    ],
)
def test_built_at_its_real_number_of_ranks(
    name: str, ranks: int, parameters: int, mesh: tuple[int, int], exchanged: str
) -> None:
    text = (ROOT / "train_configs" / f"{name}.toml").read_text()
    assert ranks == 8 or f"sized for {ranks} GPUs" in text, "the file's first line says for how many GPUs it is"
    seen, table = build(name, ranks, rank=ranks - 1)
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
