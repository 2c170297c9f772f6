"""The command `estimate`: what it prints and writes, and where it refuses."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from titan_adam_mini.cli import main
from titan_adam_mini.memory import estimate, peaks

pytest.importorskip("torchtitan", reason="simulations run torchtitan's models")

from titan_adam_mini.memory.simulate import Peak, Simulated

CONFIG = str(Path(__file__).resolve().parents[2] / "train_configs" / "debug_model.toml")
SMALL = ["--training.seq_len", "128", "--training.local_batch_size", "2"]
SHALLOW = ("--experimental.custom_import", "small_flavors", "--model.flavor", "shallow")


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(["estimate", CONFIG, *words, *SMALL])
    return " ".join(capsys.readouterr().out.split())


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["estimate", CONFIG, *words, *SMALL])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert "titan-adam-mini: " in error and "Traceback" not in error
    return error


@pytest.mark.slow
def test_table_json_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated: list[Any] = []
    largest = peaks._largest
    monkeypatch.setattr(peaks, "_largest", lambda *args: simulated.append(largest(*args)) or simulated[-1])
    file, picture = tmp_path / "a.json", tmp_path / "a.png"
    shown = told(capsys, *SHALLOW, "--ngpu", "2,4", "--json", str(file), "--plot", str(picture))
    found = json.loads(file.read_text())
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    assert [run["ngpu"] for run in found["runs"]] == [2, 4]
    for run in found["runs"]:
        assert run["optimizers"]["AdamMini"] == run["optimizers"]["AdamMini float32"], "as configured"
        for one in run["optimizers"].values():
            phases = [sum(phase["held"].values()) for phase in one["phases"]]
            assert one["peak_bytes"] == max(phases) and all(isinstance(size, int) for size in phases)
    two, four = (run["optimizers"]["AdamW"]["phases"][1]["held"] for run in found["runs"])
    elements = 2 * 32 * 128 + 4 * 128 * 128 + 3 * 384 * 128 + 3 * 128
    assert two["parameters"] == 2 * four["parameters"] == 4 * elements // 2, "float32 over two ranks"
    assert two["optimizer state"] == 2 * two["parameters"] + 4 * 12
    mini = found["runs"][0]["optimizers"]["AdamMini"]["phases"][1]["held"]["optimizer state"]
    assert two["parameters"] < mini < 1.02 * two["parameters"]
    assert "llama3 shallow, 2 ranks (dp_shard 2), rank 0: local batch 2" in shown
    assert "AdamMini float32 *" in shown and "not validated on a GPU" in shown
    # JSON alone is all of standard output.
    monkeypatch.setattr(peaks, "_largest", lambda *args: simulated[0])
    main(["estimate", CONFIG, "--ngpu", "2", "--json", *SHALLOW, *SMALL])
    assert json.loads(capsys.readouterr().out)["runs"] == found["runs"][:1]


def invented(call: Any, simulate: Any, arguments: list[str], ngpu: int, rank: int | None, *_: Any) -> Simulated:
    """In place of a simulation: parameters of 80 MiB on all ranks, AdamW's state of 160 and AdamMini's of 80, and
    activations of 1, 2 or 4 MiB per sequence."""
    flags = dict(pairwise(arguments))  # the last of a name counts
    batch, mode = int(flags["--training.local_batch_size"]), flags.get("--activation_checkpoint.mode", "none")
    activations = batch * {"full": 1, "selective": 2, "none": 4}[mode] << 20
    peaks = {
        name: [Peak("forward and backward", {"parameters": (80 + state << 20) // ngpu, "activations": activations})]
        for name, state in {"AdamW": 160, "AdamMini": 80, "AdamMini float32": 80}.items()
    }
    sizes = {"batch": batch, "passes": 1, "seq_len": 128, "seq_divisor": 1, "batch_unit": 1, "parameters": 20 << 20}
    words = {"model": "invented", "checkpointing": mode, "configured": "AdamMini float32"}
    mesh = {"dp_shard": ngpu}
    return Simulated(**words, **sizes, mesh=mesh, ngpu=ngpu, rank=0, dtypes=("", ""), peaks=peaks, refused={})


def test_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """2 ranks with AdamW have 120 MiB besides activations, with AdamMini 80, and may fill 200."""
    monkeypatch.setattr(peaks, "_largest", invented)
    words = ("--ngpu", "2", "--fit", "206MiB", "--reserve", "6MiB", "--vary", "local batch,GPUs")
    shown = told(capsys, *words, "--json", str(tmp_path / "fit.json"))
    assert "largest local batch" in shown and "fewest GPUs" in shown and "6MiB of it left free" in shown
    found: dict[str, dict[tuple[str, str], Any]] = {"local batch": {}, "GPUs": {}}
    for one in json.loads((tmp_path / "fit.json").read_text())["fit"]:
        found[one["question"]][one["checkpointing"], one["optimizer"]] = one["found"]
        assert one["found"]["peak"] <= 200 << 20 and (one["found"]["beyond"] or 201 << 20) > 200 << 20
    assert {key: one["value"] for key, one in found["local batch"].items()} == {
        ("none", "AdamW"): 20,
        ("selective", "AdamW"): 40,
        ("full", "AdamW"): 80,
        ("none", "AdamMini"): 30,
        ("selective", "AdamMini"): 60,
        ("full", "AdamMini"): 120,
    }
    assert {key[1]: one["value"] for key, one in found["GPUs"].items()} == {"AdamW": 2, "AdamMini": 1}


@pytest.mark.nightly
def test_fit_with_simulations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fit.json"
    words = ("--ngpu", "2", "--fit", "0.04GiB", "--reserve", "0B", "--vary", "local batch,GPUs", "--json", str(file))
    shown = told(capsys, *words)
    assert "largest local batch" in shown and "fewest GPUs" in shown and "0B of it left free" in shown
    found = {
        (one["question"], one["checkpointing"], one["optimizer"]): one["found"]
        for one in json.loads(file.read_text())["fit"]
    }
    room = 0.04 * 2**30
    for (question, mode, optimizer), one in found.items():
        assert one["peak"] <= room, (question, mode, optimizer)
        assert one["beyond"] is None or one["beyond"] > room
        if question == "local batch":
            assert one["value"] <= found[question, mode, "AdamMini"]["value"]
            assert one["value"] <= found[question, "full", optimizer]["value"]
    assert found["local batch", "none", "AdamW"]["value"] < found["local batch", "full", "AdamMini"]["value"]


@pytest.mark.slow
def test_the_largest_stage_of_a_pipeline_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.json"
    told(capsys, "--ngpu", "2", "--parallelism.pipeline_parallel_degree", "2", "--json", str(file))
    (both,) = json.loads(file.read_text())["runs"]
    sizes = []
    for rank in ("0", "1"):
        words = ("--ngpu", "2", "--rank", rank, "--parallelism.pipeline_parallel_degree", "2", "--json", str(file))
        told(capsys, *words)
        (run,) = json.loads(file.read_text())["runs"]
        sizes.append(run["optimizers"]["AdamW"]["peak_bytes"])
    assert both["optimizers"]["AdamW"]["peak_bytes"] == max(sizes) and sizes[0] != sizes[1]


def _wrong_plan() -> None:
    """The plan's arithmetic forgets `step`; the two ways must then disagree."""
    from unittest.mock import patch

    from titan_adam_mini.memory.peaks import _simulate_checked

    with patch("titan_adam_mini.offline.rank_memory.STEP", 0):
        _simulate_checked(["--job.config_file", CONFIG, *SHALLOW, *SMALL], 2, 0, ["AdamW"])


def test_plan_and_simulation_must_agree() -> None:
    from titan_adam_mini.tools.isolated_process import in_isolated_process

    with pytest.raises(ValueError, match=r"records [\d,]+ bytes of AdamW's state, and the plan counts"):
        in_isolated_process(_wrong_plan)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--ngpu", ""), "the number of ranks is not known"),
        (("--ngpu", "2,x"), "give positive numbers of ranks"),
        (("--ngpu", "2", "--fit", "80"), "--fit '80' is not an amount of memory: write it like 80GiB"),
        (("--ngpu", "2", "--fit", "4GiB"), "--reserve 6GiB leaves nothing of --fit 4GiB"),
        (("--ngpu", "2,4", "--fit", "80GiB"), "give one, not 2,4"),
        (("--ngpu", "2", "--fit", "80GiB", "--vary", "layers"), "--vary layers: it takes local batch, sequence, GPUs"),
        (("--ngpu", "2", "--plot", "/nowhere/a.png"), "its folder does not exist"),
        (("--ngpu", "3", "--parallelism.tensor_parallel_degree", "2"), "the mesh does not divide 3 ranks"),
        (("--ngpu", "2", "--training.enable_cpu_offload"), "does not simulate training.enable_cpu_offload"),
    ],
)
def test_refusals(
    words: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NGPU", raising=False)
    assert reason in refused(capsys, *words)


def test_amounts_of_memory() -> None:
    assert estimate.parse_bytes("80GiB", "--fit") == 80 * 2**30
    assert estimate.parse_bytes("1.5 GB", "--fit") == 1_500_000_000
    assert estimate.parse_bytes("512MiB", "--fit") == 2**29
