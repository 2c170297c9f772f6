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

import titan_adam_mini.inspect.heat_map as picture
from titan_adam_mini import AdamMini, Partition
from titan_adam_mini.inspect import Inspection, Moments, inspect, moments_of
from titan_adam_mini.inspect.estimates import budget, estimates
from titan_adam_mini.inspect.heat_map import heat_map
from titan_adam_mini.inspect.tables import show
from titan_adam_mini.partition import SECOND_MOMENTS

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


def inspected(second: dict[str, Tensor], roles: dict[str, str] | None = None, **options: Any) -> Inspection:
    moments = [Moments.of(name, v, torch.randn(v.shape) * v.sqrt(), step=3) for name, v in second.items()]
    return inspect(moments, Partition.transformer(**HEADS, roles=roles, **options))


def printed(inspection: Inspection) -> str:
    console = Console(file=StringIO(), width=200)
    show(inspection, console)
    return console.file.getvalue()


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


def knobs_of(inspection: Inspection) -> Any:
    """What our settings make of the lines that are printed last."""
    pytest.importorskip("torchtitan", reason="our settings are part of the torchtitan adapter")
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    from titan_adam_mini.titan.knobs import read_knobs

    lines = printed(inspection)
    section = tomllib.loads(lines[lines.index("[optimizer.adam_mini]") :])["optimizer"]["adam_mini"]
    return read_knobs(SimpleNamespace(adam_mini=section))


WV, WK = (f"layers.*.attention.{one}.weight" for one in ("wv", "wk"))
W1, W2 = (f"layers.*.feed_forward.{one}.weight" for one in ("w1", "w2"))


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        # w2's columns are better than its rows here, but not clearly
        ("blocks", {WV: "neuron.T", WK: "neuron", W2: "factored"}),
        ("channels", {WV: "neuron.T", W2: "factored"}),
        ("factored", {W1: "neuron"}),
    ],
)
def test_the_printed_roles_are_taken_and_keep_their_promise(option: str, expected: dict[str, str]) -> None:
    """From the printed lines through TOML, our settings and the partition to a second look, which is satisfied."""
    second, given = llama(), {"tok_embeddings.weight": "tensor"}
    for layer in range(2):
        second[f"layers.{layer}.feed_forward.w1.weight"][0, 0] = 1e6  # whose row times its column says little of others
    before = inspected(second, given, second_moment=option)
    roles = knobs_of(before).roles
    assert roles == expected | given
    after = inspected(second, roles, second_moment=option)
    assert after.roles == {} and after.second_moment is None
    promised = {one.pattern: one.suggested for one in before.patterns if one.suggested}
    for one in after.patterns:
        if one.pattern in promised:
            old = next(pattern for pattern in before.patterns if pattern.pattern == one.pattern)
            assert one.estimates["default"].role == promised[one.pattern]
            assert one.default.snr > 2 * old.default.snr
    row, later = before.settings["roles"], after.settings[option]
    assert row.layouts == later.layouts and row.below == later.below == 0
    assert row.total.entries == later.total.entries and row.total.noise == pytest.approx(later.total.noise)


def even_in_channels() -> dict[str, Tensor]:
    """Second moments that are even in the blocks of "channels", and most of them in no others."""
    second = llama()
    for name, v in second.items():
        rows, columns = (torch.exp(3.0 * (torch.arange(size) % 3)) for size in (v.shape[0], v.shape[-1]))
        if name.endswith(("wq.weight", "wk.weight")):
            second[name] = rows[:, None].expand(v.shape)
        elif name.endswith(("wo.weight", "w2.weight")):
            second[name] = columns.expand(v.shape)
        elif name.endswith("wv.weight"):
            second[name] = 1 + 0.1 * torch.rand(v.shape)
    return second


def test_one_line_takes_the_place_of_roles_that_amount_to_it() -> None:
    second, given = even_in_channels(), {"tok_embeddings.weight": "tensor"}
    before = inspected(second, given)
    assert before.second_moment == before.facts()["second_moment"] == "channels"
    knobs = knobs_of(before)
    assert (knobs.second_moment, knobs.roles) == ("channels", {}), "the configuration's roles stay where they are"
    after = inspected(second, given, second_moment=knobs.second_moment)
    assert after.roles == {} and after.settings["channels"].layouts == before.settings["roles"].layouts
    assert "Nothing to change: no ratio is below 1." in printed(after)
    for layer in range(2):  # needs nothing, so the roles are no longer the channels
        second[f"layers.{layer}.attention.wq.weight"] = torch.ones(12, 12)
    other = inspected(second, given)
    assert other.second_moment is None and len(knobs_of(other).roles) == 3 + len(given)
    assert f'The best single setting: second_moment = "{other.best_option}".' in printed(other)


def test_every_setting_is_measured() -> None:
    second, given = llama(), {"layers.1.attention.wk.weight": "tensor"}
    inspection = inspected(second, given)
    told = inspection.facts()["settings"]
    assert list(told) == ["blocks", "channels", "factored", "roles"] and inspection.facts()["configured"] == "blocks"
    moments = [Moments.of(name, v) for name, v in second.items()]
    for option in list(told)[:3]:
        alone = inspect(moments, Partition.transformer(**HEADS, roles=given, second_moment=option))
        default = [one.default for one in alone.patterns]
        assert told[option]["entries"] == sum(loss.entries for loss in default)
        assert told[option]["snr"] == min(loss.snr for loss in default)
        assert told[option]["below"] == sum(loss.snr < 1 for loss in default) > 0, "the role given is kept"
        assert told[option]["pattern"] == min(alone.patterns, key=lambda one: one.default.snr).pattern
    assert told["roles"]["below"] == 0 and told["roles"]["distance"] < told["blocks"]["distance"]
    apart = sum(inspection.losses[name]["default"].difference for name in second)
    own = sum(inspection.losses[name]["default"].update for name in second)
    assert told["blocks"]["distance"] == pytest.approx((apart / own) ** 0.5)
    lines = printed(inspection).splitlines()
    assert any(line.split()[:2] == ["blocks", "(configured)"] for line in lines)
    assert any(line.split()[:3] == ["the", "roles", "below"] for line in lines)


def test_the_best_setting_in_one_line() -> None:
    second = {name: v for name, v in llama().items() if "wv" not in name}
    assert inspected(second).best_option == "factored", "nothing else is near to AdamW in w2"
    second["norm.weight"] = torch.exp(9 * torch.randn(12))  # the lowest ratio with all, and the most noise
    settings = inspected(second).settings
    assert settings["channels"].lowest == settings["factored"].lowest
    assert inspected(second).best_option == "factored"
    without_updates = inspect([Moments.of(name, v) for name, v in second.items()], Partition.transformer(**HEADS))
    assert without_updates.settings["blocks"].total.distance is None and without_updates.best_option == "factored"
    second = {name: v for name, v in second.items() if "w2" not in name}
    settings = inspected(second).settings
    apart = [settings[option].total.distance for option in ("channels", "factored")]
    assert apart[0] != apart[1] == pytest.approx(apart[0], abs=5e-4)
    assert inspected(second).best_option == "channels", "as near, and smaller"
    even = {name: torch.ones_like(v) for name, v in second.items()}
    for option in SECOND_MOMENTS:
        assert inspected(even, second_moment=option).best_option == option, "nothing is better than what is there"


def test_a_setting_that_does_not_go_with_the_partition_is_left_out() -> None:
    inspection = inspected(llama(), value_blocks="tensor")
    assert list(inspection.settings) == ["blocks", "factored", "roles"]
    assert "second_moment = \"channels\" is left out: second_moment='channels' cannot be combined" in printed(
        inspection
    )
    assert "one second moment per row" in inspection.facts()["refused"]["channels"]


def test_the_role_is_the_one_that_the_blocks_have() -> None:
    shapes = {"layers.0.attention.wq.weight": (12, 12), "layers.0.attention.wk.weight": (1, 12), "norm.weight": (12,)}
    second = {name: torch.rand(shape) + 1 for name, shape in shapes.items()}
    for option, roles in (
        ("channels", ["neuron", "neuron", "norm"]),
        ("factored", ["factored", "factored", "norm"]),
    ):
        found = inspected(second, second_moment=option).estimates
        assert [one["default"].role for one in found.values()] == roles
        given = Partition.transformer(**HEADS, roles=dict(zip(shapes, roles, strict=True))).assign(shapes)
        assert {name: one.layouts for name, one in given.items()} == {
            name: one["default"].layouts for name, one in found.items()
        }


def test_shapes_that_disagree_under_one_pattern_are_written_out() -> None:
    even, uneven = torch.rand(6, 8) + 1, torch.exp(2 * torch.randn(1, 9)) * torch.ones(6, 9)
    both = {"layers.0.wo.weight": even, "layers.1.wo.weight": uneven}
    assert inspected(both).roles == {"layers.1.wo.weight": "neuron.T"}
    assert inspected({"layers.1.wo.weight": uneven}).roles == {"layers.*.wo.weight": "neuron.T"}


def test_where_nothing_better_may_be_had_it_says_so() -> None:
    uneven = torch.exp(3 * torch.randn(40, 40))
    inspection = inspected({"layers.0.wo.weight": uneven})
    assert inspection.roles == {} and inspection.patterns[0].default.snr < 1
    lines = printed(inspection)
    assert "No roles to try: where the default's ratio is below 1, no other with at most rows" in lines
    assert "[optimizer.adam_mini]" not in lines


@pytest.mark.parametrize(
    ("shape", "want"),
    [
        ((), 1),
        ((12,), 12),
        ((1, 9), 9),
        ((6, 8), 15),
        ((2, 2), 3),
        ((3, 5, 7), 3 * 13),
        ((8, 4, 2), 56),
        ((8, 2, 2), 31),
        ((8, 4, 3, 3), 8 * 4 * 7),
        ((8, 4, 1, 1), 31),
    ],
)
def test_the_best_has_fewer_second_moments_than_elements(shape: tuple[int, ...], want: int) -> None:
    assert budget(shape) == want
    name = "patch_embed.proj.weight" if len(shape) > 2 else "norm.weight" if len(shape) < 2 else "layers.0.wo.weight"
    (pattern,) = inspected({name: torch.exp(2 * torch.randn(shape))}, {name: "tensor"}).patterns
    entries, elements = pattern.estimates[pattern.best].entries, torch.Size(shape).numel()
    assert entries < elements or sum(size > 1 for size in shape) < 2


def test_what_never_had_a_gradient() -> None:
    second = llama() | {"layers.1.attention.wq.weight": torch.zeros(12, 12), "output.weight": torch.zeros(20, 12)}
    inspection = inspected(second)
    patterns = {one.pattern: one for one in inspection.patterns}
    output, wq = patterns["output.weight"], patterns["layers.*.attention.wq.weight"]
    assert output.best is None and output.suggested is None
    assert wq.best == "factored" and wq.default.elements == 144
    lines = printed(inspection)
    row = next(line for line in lines.splitlines() if line.split()[:1] == ["output.weight"])
    assert row.split() == ["output.weight", "1", "20x12", "token", "no", "gradient"]
    assert "2 parameters (output.weight, layers.*.attention.wq.weight)." in lines.replace("\n", " ")
    told = next(one for one in inspection.facts()["patterns"] if one["pattern"] == "output.weight")
    assert (told["elements"], told["best"], told["candidates"]["rows"]["noise"]) == (0, None, None)
    with_it, without = (
        inspected({n: v for n, v in second.items() if n in names})
        for names in (second, set(second) - {"output.weight"})
    )
    assert with_it.settings["blocks"].below == without.settings["blocks"].below


def test_roles_that_end_weight_decay_say_so() -> None:
    v = torch.exp(3 * torch.randn(12))
    assert "removes weight decay from norm.weight." in printed(inspected({"norm.weight": v}, undecayed=["bias"]))
    for undecayed in ([], ["norm", "bias"]):
        assert "weight decay" not in printed(inspected({"norm.weight": v}, undecayed=undecayed))


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
    with pytest.raises(ValueError, match=r"no trainable parameter of AdamW has an exp_avg_sq: .* after its first step"):
        moments_of(model, optimizer)
    mini = AdamMini(model.named_parameters(), n_heads=CONFIG.n_head)
    mini.init_state()
    with pytest.raises(ValueError, match=r"wte.weight has second moments of shape \(40, 1\): inspect needs AdamW's"):
        moments_of(model, mini)


def test_parameters_without_state() -> None:
    """One that is not trained, one that never had a gradient, and the others, of which all is said as ever."""
    model, optimizer = trained(3)
    want = inspect(moments_of(model, optimizer), Partition.from_config(CONFIG)).losses
    frozen, unused = model.transformer["wpe"].weight, model.transformer["ln_f"].bias
    frozen.requires_grad_(False)
    for param in (frozen, unused):
        del optimizer.state[param]
    inspection = inspect(moments_of(model, optimizer), Partition.from_config(CONFIG))
    assert set(want) - set(inspection.losses) == {"transformer.wpe.weight"}
    assert inspection.without_gradient == {"transformer.ln_f.bias": 1}
    assert "Never had a gradient, and left out: 1 parameter (transformer.ln_f.bias)." in printed(inspection)
    for name, losses in inspection.losses.items():
        assert name == "transformer.ln_f.bias" or losses == want[name]


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


@pytest.mark.parametrize("layers", [1, 41])
def test_the_picture(tmp_path: Path, layers: int) -> None:
    """From 41 layers on it is drawn finer."""
    pytest.importorskip("matplotlib", reason="pictures need the extra titan")
    few = {name: v for name, v in llama(layers).items() if layers == 1 or "wo" in name or "layers" not in name}
    heat_map(tmp_path / "map.png", "Llama", inspected(few))
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_is_grey_where_no_gradient_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra titan")
    seen: list[Any] = []
    rectangle = picture._rectangle
    monkeypatch.setattr(picture, "_rectangle", lambda *args: seen.append(args[2]["facecolor"]) or rectangle(*args))
    second = {"layers.0.wo.weight": torch.zeros(4, 4), "layers.1.wo.weight": torch.rand(4, 4) + 1}
    heat_map(tmp_path / "map.png", "Llama", inspected(second))
    assert seen[0] == picture._UNKNOWN and len(set(seen)) > 1
    assert seen.count(picture._UNKNOWN) == len(seen) / 2


def test_the_picture_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pictures need matplotlib"):
        heat_map(tmp_path / "map.png", "Llama", inspected(llama(1)))
