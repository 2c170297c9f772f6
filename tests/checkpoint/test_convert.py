"""AdamW's checkpoints become AdamMini's and back: every entry, and nothing half-written whatever happens."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import forkserver
from stored_runs import FACTOR, LR, STEPS, group_of, partition, saved

from titan_adam_mini.check.meshes import DENSE, factors, full_shapes, layouts
from titan_adam_mini.check.oracle import error
from titan_adam_mini.checkpoint.moments import spread
from titan_adam_mini.checkpoint.stored import Stored
from titan_adam_mini.convert.convert import Conversion, convert

STATE = "optimizer.state."


def blocks(second_moment: str = "blocks") -> dict[str, Any]:
    return partition(second_moment=second_moment).assign(full_shapes(DENSE))


def conversion(source: Path, to: str, lr: float | None = None, second_moment: str = "blocks") -> Conversion:
    group = group_of("AdamW" if to == "adamw" else "AdamMini")
    return Conversion(Stored(source), to, blocks(second_moment), group, lr)


def entries(path: Path) -> dict[str, Any]:
    stored = Stored(path)
    return {key: stored.value(key) for key in stored.metadata.state_dict_metadata}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def mean(values: torch.Tensor, name: str) -> torch.Tensor:
    """The mean over every block in float64, tile by tile."""
    values = values.double()
    for dim, tiles in enumerate(layouts(DENSE)[name].dims):
        pieces = values.split(tiles.lengths(), dim)
        values = torch.cat([piece.mean(dim, keepdim=True) for piece in pieces], dim)
    return values


def test_to_adam_mini(adamw: Path, mini: Path, tmp_path: Path) -> None:
    done: list[int] = []
    rows = convert(conversion(adamw, "adam_mini"), tmp_path / "new" / "step-4", done.append)
    old, new, like = entries(adamw), entries(tmp_path / "new" / "step-4"), entries(mini)
    assert set(new) == set(like), "exactly AdamMini's own keys"
    assert sum(done) == Stored(adamw).size
    for key, value in new.items():
        if key.startswith(STATE) and key.endswith(".exp_avg_sq"):
            name = key.removeprefix(STATE).removesuffix(".exp_avg_sq")
            assert value.dtype == torch.float32 and value.shape == like[key].shape
            assert error(value, mean(old[key], name)) < 1e-6
        else:
            assert same(value, old.get(key, like[key])), key
    assert {role for role, *_ in rows} == {one.role for one in blocks().values()}
    for role, before, after in rows:
        assert min(before, after) > 0 and before != after, role
    files = sorted(path.name for path in (tmp_path / "new" / "step-4").iterdir())
    assert files == sorted(path.name for path in adamw.iterdir()), "one file for each, and nothing else"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["step-4"]


def test_to_adamw(adamw: Path, mini: Path, tmp_path: Path) -> None:
    rows = convert(conversion(mini, "adamw"), tmp_path / "step-4")
    old, new, like = entries(mini), entries(tmp_path / "step-4"), entries(adamw)
    assert set(new) == set(like)
    for key, value in new.items():
        if key.startswith(STATE) and key.endswith(".exp_avg_sq"):
            name = key.removeprefix(STATE).removesuffix(".exp_avg_sq")
            layout = layouts(DENSE)[name]
            for dim, tiles in enumerate(layout.dims):
                old[key] = old[key].repeat_interleave(torch.tensor(tiles.lengths()), dim)
            assert same(value, old[key]), key
        else:
            assert same(value, old.get(key, like[key])), key
    assert all(before == after for _, before, after in rows), "the last update stays as it is"
    assert new["optimizer.param_groups.output.weight.foreach"] is True


def test_there_and_back_the_second_moments_are_the_same(mini: Path, tmp_path: Path) -> None:
    convert(conversion(mini, "adamw"), tmp_path / "a")
    convert(conversion(tmp_path / "a", "adam_mini"), tmp_path / "b")
    one, other = entries(mini), entries(tmp_path / "b")
    assert set(one) == set(other)
    for key, value in one.items():
        assert error(other[key], value) < 1e-6 if key.endswith(".exp_avg_sq") else same(value, other[key]), key


def test_factored_there_and_back(adamw: Path, tmp_path: Path) -> None:
    """Rows, columns and the whole are AdamW's means; an element becomes their product, and has the same means again."""
    like = entries(saved(tmp_path / "like", "AdamMini", second_moment="factored"))
    convert(conversion(adamw, "adam_mini", second_moment="factored"), tmp_path / "a")
    rows = convert(conversion(tmp_path / "a", "adamw", second_moment="factored"), tmp_path / "b")
    convert(conversion(tmp_path / "b", "adam_mini", second_moment="factored"), tmp_path / "c")
    old, one, back, again = entries(adamw), entries(tmp_path / "a"), entries(tmp_path / "b"), entries(tmp_path / "c")
    assert set(one) == set(again) == set(like) and set(back) == set(old)
    assert all(before == after for _, before, after in rows), "the last update stays as it is"
    for name, two in factors(DENSE).items():
        second, key = old[f"{STATE}{name}.exp_avg_sq"].double(), f"{STATE}{name}.exp_avg_sq"
        row, column = second.mean(-1, keepdim=True), second.mean(-2, keepdim=True)
        whole = second.mean((-1, -2), keepdim=True)
        for suffix, want, shape in (
            ("", row, row.shape),
            ("_col", column, two[0].grid_shape),
            ("_mean", whole, two[1].grid_shape),
        ):
            assert one[key + suffix].shape == shape and one[key + suffix].dtype == torch.float32
            assert error(one[key + suffix], want) < 1e-6 and error(again[key + suffix], want) < 1e-5
        assert error(back[key], row * column / whole) < 1e-6
    with pytest.raises(ValueError, match=r"second moments of shape .* and .*the configuration's partition"):
        conversion(tmp_path / "a", "adamw")


def test_a_new_learning_rate_keeps_the_place_in_the_schedule(adamw: Path, tmp_path: Path) -> None:
    convert(conversion(adamw, "adam_mini", lr=7e-4), tmp_path / "step-4")
    old, new = entries(adamw), entries(tmp_path / "step-4")
    assert old["lr_scheduler.base_lrs"] == [LR] and new["lr_scheduler.base_lrs"] == [7e-4]
    assert new["lr_scheduler._last_lr"] == pytest.approx([7e-4 * FACTOR])
    for name in full_shapes(DENSE):
        assert new[f"optimizer.param_groups.{name}.initial_lr"] == 7e-4
        assert new[f"optimizer.param_groups.{name}.lr"] == pytest.approx(7e-4 * FACTOR)


@pytest.mark.parametrize(
    "mesh", ["one rank", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("FSDP2 8", "HSDP 2x3", "PP 2"))]
)
def test_the_source_may_come_from_any_mesh(adamw: Path, tmp_path: Path, mesh: str) -> None:
    source = saved(tmp_path / "source", "AdamW", mesh)
    convert(conversion(source, "adam_mini"), tmp_path / "to")
    convert(conversion(adamw, "adam_mini"), tmp_path / "want")
    got, want = entries(tmp_path / "to"), entries(tmp_path / "want")
    assert set(got) == set(want)
    assert all(same(got[key], want[key]) for key in want if key.startswith(STATE))


def test_a_box_is_spread_as_the_whole_is() -> None:
    layout = layouts(DENSE)["layers.0.attention.wk.weight"]
    grid = torch.arange(layout.num_blocks, dtype=torch.float32).reshape(layout.grid_shape)
    rows, columns = layout.shape
    whole = spread([grid], [layout], [(0, rows), (0, columns)])
    assert torch.equal(spread([grid], [layout], [(3, rows - 1), (1, 2)]), whole[3 : rows - 1, 1:2])
    assert spread([grid], [layout], [(rows, rows), (0, columns)]).shape == (0, columns)


# Refusals


def test_what_cannot_be_converted_is_refused_in_words(adamw: Path, mini: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has AdamW's optimizer state already"):
        conversion(adamw, "adamw")
    with pytest.raises(ValueError, match=r"no .metadata"):
        Stored(tmp_path)
    with pytest.raises(ValueError, match="not a folder"):
        Stored(tmp_path / "nowhere")
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="nothing is overwritten"):
        convert(conversion(adamw, "adam_mini"), tmp_path / "there")
    fewer = {name: one for name, one in blocks().items() if "wq" not in name}
    with pytest.raises(ValueError, match=r"has state for .*wq.*is this the configuration of that run"):
        Conversion(Stored(adamw), "adam_mini", fewer, {})
    more = {**blocks(), "layers.9.attention.wq.weight": next(iter(blocks().values()))}
    with pytest.raises(ValueError, match=r"has no state for layers.9"):
        Conversion(Stored(adamw), "adam_mini", more, {})
    with pytest.raises(ValueError, match=r"tok_embeddings.weight has second moments of shape .* partition"):
        other = type(partition()).per_tensor().assign(full_shapes(DENSE))
        Conversion(Stored(mini), "adamw", other, {})
    with pytest.raises(ValueError, match="is not a learning rate"):
        conversion(adamw, "adam_mini", lr=-1.0)


def test_an_error_half_way_leaves_nothing(adamw: Path, tmp_path: Path) -> None:
    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(conversion(adamw, "adam_mini"), tmp_path / "deep" / "down" / "step-4", stop)
    assert list(tmp_path.iterdir()) == []


def slowly(source: Path, target: Path, begun: Path) -> None:
    """A conversion that waits after every tensor, in a process of its own."""

    def wait(count: int) -> None:
        begun.touch()
        time.sleep(0.2)

    convert(conversion(source, "adam_mini"), target, wait)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_it_leaves_no_checkpoint_and_the_next_one_says_what_is_left(
    adamw: Path, tmp_path: Path, number: signal.Signals
) -> None:
    target, begun = tmp_path / "to" / "checkpoint" / "step-4", tmp_path / "begun"
    process = forkserver().Process(target=slowly, args=(adamw, target, begun))
    process.start()
    while not begun.exists():
        assert process.is_alive()
        time.sleep(0.01)
    with pytest.raises(ValueError, match="another conversion is writing"):
        convert(conversion(adamw, "adam_mini"), target)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode not in (0, None)
    assert not target.exists()
    left = list(tmp_path.glob("to/*"))
    assert left == [] if number == signal.SIGTERM else "step-" not in next(left[0].iterdir()).name
    if number == signal.SIGKILL:
        (rest,) = target.parent.iterdir()
        with pytest.raises(ValueError, match=rf"{rest} was left by a killed conversion to .*/step-4: remove it"):
            convert(conversion(adamw, "adam_mini"), target)
        shutil.rmtree(rest)
    convert(conversion(adamw, "adam_mini"), target)
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert entries(target)["train_state.step"] == STEPS
