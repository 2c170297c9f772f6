"""launch/run_train.sh keeps the contract of torchtitan's script, seen by a module that only says how it was started."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SAYS = """\
import json, os, sys
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NGPU", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF")
print("SAID " + json.dumps({"argv": sys.argv[1:], **{name: os.environ.get(name) for name in names}}), flush=True)
sys.exit(int(os.environ.get("STATUS", "0")))
"""


@pytest.fixture
def start(tmp_path: Path):
    """Run the script with the environment given; returns the finished process and what each shown rank said."""
    (tmp_path / "says.py").write_text(SAYS)

    def run(*arguments: str, cwd: Path = ROOT, **environment: str):
        kept = {name: value for name, value in os.environ.items() if name not in ("NGPU", "LOG_RANK", "CONFIG_FILE")}
        paths = os.pathsep.join([str(tmp_path), kept["PYTHONPATH"]])
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / "run_train.sh"), *arguments],
            cwd=cwd,
            env={**kept, "TRAIN_FILE": "says", **environment, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=120,
        )
        said = [json.loads(line.partition("SAID ")[2]) for line in done.stdout.splitlines() if "SAID " in line]
        return done, said

    return run


def test_ranks_arguments_and_the_rank_that_is_shown(start) -> None:
    done, said = start("--training.steps", "3", "--job.description", "two words", NGPU="2", LOG_RANK="1")
    assert done.returncode == 0, done.stderr
    assert [(one["RANK"], one["WORLD_SIZE"], one["LOCAL_RANK"]) for one in said] == [("1", "2", "1")]
    config = str(ROOT / "train_configs" / "debug_model.toml")
    expected = ["--job.config_file", config, "--training.steps", "3", "--job.description", "two words"]
    assert said[0]["argv"] == expected
    assert said[0]["OMP_NUM_THREADS"] == "1"


def test_a_failing_rank_is_the_scripts_failure(start, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("")
    done, said = start(cwd=tmp_path, NGPU="1", CONFIG_FILE="mine.toml", STATUS="3")
    assert done.returncode != 0
    assert said[0]["argv"] == ["--job.config_file", "mine.toml"]


def test_fake_backend_is_one_process_and_one_step(start) -> None:
    done, said = start("--training.steps", "9", NGPU="64", COMM_MODE="fake_backend")
    assert done.returncode == 0, done.stderr
    (one,) = said
    assert (one["NGPU"], one["LOCAL_RANK"], one["WORLD_SIZE"]) == ("64", "0", None)
    assert one["argv"][-2:] == ["--comm.mode=fake_backend", "--training.steps=1"], "the last one counts"


@pytest.mark.parametrize(
    ("environment", "said"),
    [({"CONFIG_FILE": "nowhere.toml"}, "nowhere.toml does not exist"), ({"COMM_MODE": "fake"}, "COMM_MODE=fake")],
)
def test_refusals(start, environment: dict[str, str], said: str) -> None:
    done, _ = start(NGPU="1", **environment)
    assert done.returncode == 2
    assert said in done.stderr
