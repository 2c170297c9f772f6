"""What is said of a model: patterns, the best way within a budget, roles that our own settings take, JSON, picture."""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from small_gpt2 import CONFIG, trained
from torch import Tensor

from titan_adam_mini import AdamMini, Partition
from titan_adam_mini.inspect import Inspection, Moments, inspect, moments_of
from titan_adam_mini.inspect.command import show
from titan_adam_mini.inspect.estimates import estimates
from titan_adam_mini.inspect.heat_map import heat_map

HEADS = {"n_heads": 4, "n_kv_heads": 2}


def llama(layers: int = 2) -> dict[str, Tensor]:
    """Second moments of a Llama: `wv` is even within columns, `wk` within rows, `w2` almost factored."""
    torch.manual_seed(0)
    shapes = {"tok_embeddings.weight": (20, 12), "norm.weight": (12,), "output.weight": (20, 12)}
    for layer in range(layers):
        shapes |= {f"layers.{layer}.attention.{one}.weight": (12, 12) for one in ("wq", "wo")}
        shapes |= {f"layers.{layer}.attention.{one}.weight": (6, 12) for one in ("wk", "wv")}
        shapes |= {f"layers.{layer}.feed_forward.w{n}.weight": (12, 16) if n == 2 else (16, 12) for n in (1, 2, 3)}
        shapes |= {f"layers.{layer}.{one}.weight": (12,) for one in ("attention_norm", "ffn_norm")}
    second = {}
    for name, shape in shapes.items():
        rows, columns = (torch.exp(3.0 * (torch.arange(size) % n)) for size, n in ((shape[0], 3), (shape[-1], 4)))
        second[name] = 1 + 0.1 * torch.rand(shape)
        if "w2" in name:
            second[name] *= rows[:, None] * columns
        elif "wk" in name or "wv" in name:
            second[name] = rows[:, None].expand(shape) if "wk" in name else columns.expand(shape)
    return second


def inspected(second: dict[str, Tensor], roles: dict[str, str] | None = None) -> Inspection:
    moments = [Moments.of(name, v, torch.randn(v.shape), step=3) for name, v in second.items()]
    return inspect(moments, Partition.transformer(**HEADS, roles=roles))


def test_patterns_come_with_what_is_lost_most_first() -> None:
    inspection = inspected(llama())
    ratios = [one.default.snr for one in inspection.patterns]
    assert ratios == sorted(ratios) and len(ratios) == 12
    assert {one.pattern for one in inspection.patterns[:3]} == {
        f"layers.*.{one}.weight" for one in ("attention.wv", "attention.wk", "feed_forward.w2")
    }
    best = {one.pattern.split(".")[-2]: one.best for one in inspection.patterns}
    assert (best["w2"], best["wv"], best["wk"], best["norm"]) == ("factored", "columns", "rows", "elementwise")
    assert inspection.candidates == ["default", "rows", "columns", "factored", "tensor", "elementwise"]


def test_the_printed_roles_are_taken_and_keep_their_promise(tmp_path: Path) -> None:
    """From the printed lines through TOML, our settings and the partition to a second look, which is satisfied."""
    pytest.importorskip("torchtitan", reason="our settings are part of the torchtitan adapter")
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    from titan_adam_mini.titan.knobs import read_knobs

    second, given = llama(), {"tok_embeddings.weight": "tensor"}
    before = inspected(second, given)
    console = Console(file=StringIO(), width=200)
    show(before, console)
    printed = console.file.getvalue()
    section = tomllib.loads(printed[printed.index("[optimizer.adam_mini]") :])["optimizer"]["adam_mini"]
    roles = read_knobs(SimpleNamespace(adam_mini=section)).roles
    expected = {"layers.*.attention.wv.weight": "neuron.T", "layers.*.attention.wk.weight": "neuron"}
    expected["layers.*.feed_forward.w2.weight"] = "factored"
    assert roles == expected | given, "w2's columns are better than its rows here, but not clearly"
    after = inspected(second, roles)
    assert after.roles == {}
    promised = {one.pattern: one.suggested for one in before.patterns if one.suggested}
    for one in after.patterns:
        if one.pattern in promised:
            old = next(pattern for pattern in before.patterns if pattern.pattern == one.pattern)
            assert one.estimates["default"].role == promised[one.pattern]
            assert one.default.snr > 2 * old.default.snr
    assert partition_of(roles).assign({name: v.shape for name, v in second.items()})


def partition_of(roles: dict[str, str]) -> Partition:
    return Partition.from_config(HEADS, roles=roles)


def test_a_pattern_of_several_shapes_is_suggested_only_where_they_agree() -> None:
    even, uneven = torch.rand(6, 8) + 1, torch.exp(2 * torch.randn(1, 9)) * torch.ones(6, 9)
    both = {"layers.0.wo.weight": even, "layers.1.wo.weight": uneven}
    assert inspected(both).roles == {}
    assert inspected({"layers.1.wo.weight": uneven}).roles == {"layers.*.wo.weight": "neuron.T"}


def test_heads_stand_beside_roles_that_are_not_heads() -> None:
    shapes = {"layers.0.attention.wq.weight": (12, 12), "layers.0.attention.wo.weight": (12, 12)}
    found = estimates(Partition.transformer(**HEADS, roles={"wq.weight": "neuron"}), shapes)
    assert found["layers.0.attention.wq.weight"]["heads"].layouts[0].grid_shape == (4, 1)
    assert "heads" not in found["layers.0.attention.wo.weight"]
    assert all("heads" not in one for one in estimates(Partition.per_tensor(), shapes).values()), "it is not told any"


def test_a_gpt2_of_hugging_face() -> None:
    """Not a model of torchtitan: fused, stored [in, out], tied, with biases."""
    model, optimizer = trained(30)
    inspection = inspect(moments_of(model, optimizer), Partition.from_config(CONFIG))
    patterns = {one.pattern.removeprefix("transformer."): one for one in inspection.patterns}
    qkv, up = patterns["h.*.attn.c_attn.weight"], patterns["h.*.mlp.c_fc.weight"]
    assert qkv.estimates["default"].role == "qkv.T" and up.estimates["default"].role == "neuron.T"
    assert qkv.estimates["default"].layouts[0].grid_shape == (1, 4 + 4 + 24)
    assert up.losses["default"] == up.losses["columns"] != up.losses["rows"], "its outputs are the columns"
    embedding = patterns["wte.weight"]
    assert embedding.losses["default"].snr > 2 * embedding.losses["tensor"].snr, "few words are frequent"
    assert patterns["h.*.mlp.c_fc.bias"].default.distance == 0, "biases have one per element"
    assert all(one.default.rms_ratio is not None for one in inspection.patterns)
    assert "lm_head.weight" not in inspection.losses, "tied"


def test_other_optimizers_are_refused() -> None:
    model, optimizer = trained(0)
    with pytest.raises(ValueError, match=r"transformer.wte.weight has no exp_avg_sq: .* after its first step"):
        moments_of(model, optimizer)
    mini = AdamMini(model.named_parameters(), n_heads=CONFIG.n_head)
    mini.init_state()
    with pytest.raises(ValueError, match=r"wte.weight has second moments of shape \(40, 1\): inspect needs AdamW's"):
        moments_of(model, mini)


def test_everything_is_in_the_json() -> None:
    second = llama() | {"output.weight": torch.ones(20, 12)}
    told: dict[str, Any] = json.loads(json.dumps(inspected(second).facts(), allow_nan=False))
    assert [one["name"] for one in told["parameters"]] == list(second)
    output = next(one for one in told["parameters"] if one["name"] == "output.weight")
    assert output["pattern"] == "output.weight" and output["step"] == 3
    even = output["candidates"]["rows"]
    assert (even["noise"], even["snr"], even["block_snr"], even["entries"]) == (0, None, None, 20)
    assert even["distance"] == pytest.approx(0, abs=1e-12)
    for one in told["patterns"]:
        members = [parameter for parameter in told["parameters"] if parameter["pattern"] == one["pattern"]]
        assert one["parameters"] == len(members)
        for name, candidate in one["candidates"].items():
            assert candidate["entries"] == sum(parameter["candidates"][name]["entries"] for parameter in members)
    w2 = next(one for one in told["patterns"] if "w2" in one["pattern"])
    assert w2["budget"] == w2["candidates"]["factored"]["entries"] == 2 * (12 + 16 + 1)
    assert w2["best"] == "factored"


@pytest.mark.parametrize("layers", [1, 80])
def test_the_picture(tmp_path: Path, layers: int) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra titan")
    heat_map(tmp_path / "map.png", "Llama", inspected(llama(layers)))
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pictures need matplotlib"):
        heat_map(tmp_path / "map.png", "Llama", inspected(llama(1)))
