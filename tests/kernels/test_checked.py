"""Tensors that change under the optimizer: planned anew where that can be, else refused by name and nothing changed.

Addresses are what compiled loops work with: each of these was a broken heap, or values written to the wrong place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from titan_adam_mini import AdamMini, Partition
from titan_adam_mini.check.engines import LAYOUTS, SimulatedRank, engine_of, gradients, reference_engine, step
from titan_adam_mini.check.oracle import Oracle, error
from titan_adam_mini.kernels import Factor, ParamStep
from titan_adam_mini.kernels.check import check
from titan_adam_mini.kernels.compiled import Compiled
from titan_adam_mini.layout import BlockLayout


def by_rows(*names: str) -> Partition:
    """One block per row, or per output channel of what is called conv."""
    roles = {name: "convolution" if name.startswith("conv") else "neuron" for name in names}
    return Partition.transformer(roles=roles)


class Steps:
    """Two copies of some weights, of the fused engine and of torch's operations, moved on side by side."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], **options: Any) -> None:
        torch.manual_seed(0)
        start = {name: torch.randn(shape) for name, shape in shapes.items()}
        self.params = [
            {name: torch.nn.Parameter(value.clone()) for name, value in start.items()} for _ in ("fused", "foreach")
        ]
        self.optimizers = [
            AdamMini(params.items(), lr=1e-2, partition=by_rows(*shapes), **options, **flag)
            for params, flag in zip(self.params, ({}, {"foreach": True}), strict=True)
        ]
        assert isinstance(self._engine(), Compiled)

    def _engine(self) -> Any:
        self.optimizers[0].init_state()
        return self.optimizers[0].engine

    def move(self, laid_out: Callable[[Tensor], Tensor] = torch.clone) -> None:
        """One step with equal gradients, `laid_out` in memory for the fused engine."""
        for name, param in self.params[0].items():
            grad = torch.randn(param.shape)
            param.grad, self.params[1][name].grad = laid_out(grad), grad.clone()
        for optimizer in self.optimizers:
            optimizer.step()

    def compare(self) -> None:
        assert not self._engine()._fallbacks
        for name, param in self.params[0].items():
            torch.testing.assert_close(param, self.params[1][name], rtol=1e-5, atol=1e-6, msg=name)


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("momentum", [None, torch.bfloat16])
def test_a_weight_that_becomes_channels_last_goes_on(momentum: torch.dtype | None) -> None:
    both = Steps({"conv.weight": (6, 4, 3, 2), "w": (5, 7)}, momentum_dtype=momentum)
    both.move()
    weight = both.params[0]["conv.weight"]
    weight.data = channels_last(weight.data)
    for laid_out in (torch.clone, lambda x: channels_last(x) if x.ndim == 4 else x):
        both.move(laid_out)
        assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        both.compare()


def test_gradients_and_momentum_may_change_their_strides_in_every_step() -> None:
    both = Steps({"conv.weight": (6, 4, 3, 2), "w": (6, 8)})
    for number in range(6):
        if number in (2, 4):
            for param in both.params[0].values():
                state = both.optimizers[0].state[param]
                change = transposed if number == 2 else torch.clone
                state["exp_avg"] = change(state["exp_avg"])
        both.move((torch.clone, transposed, lambda x: x.repeat_interleave(2, -1)[..., ::2])[number % 3])
        both.compare()


def test_a_transposed_square_of_the_same_address_is_noticed() -> None:
    both = Steps({"w": (6, 6)})
    both.move()
    for params in both.params:
        params["w"].data = params["w"].data.t()
    both.move()
    both.compare()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_gradients_of_any_dtype_are_read(dtype: torch.dtype) -> None:
    """The engine reads no float16: it gets a copy, and no other engine comes in for this rank alone."""
    layouts = {name: LAYOUTS[name] for name in ("rows", "heads", "norm", "columns", "factored")}
    engine = engine_of("cpu")
    two = SimulatedRank(layouts, engine), SimulatedRank(layouts, reference_engine())
    for number in range(2):
        grads = gradients(layouts, number, dtype)
        for simulated in two:
            simulated.give(grads)
            step([simulated])
    assert isinstance(engine, Compiled) and not engine._fallbacks
    for mine, other in zip(two[0].param_steps, two[1].param_steps, strict=True):
        assert torch.equal(mine.exp_avg, other.exp_avg), mine.name
        torch.testing.assert_close(mine.param, other.param, rtol=1e-6, atol=1e-7, msg=mine.name)


def test_int8_momentum_at_an_odd_address_and_second_moments_with_gaps() -> None:
    layouts = {name: LAYOUTS[name] for name in ("heads", "factored experts", "experts")}
    engine = engine_of("cpu")
    two = [SimulatedRank(layouts, one, momentum=torch.int8) for one in (engine, reference_engine())]
    for param_step in two[0].param_steps:
        odd = torch.zeros(param_step.exp_avg.numel() + 3, dtype=torch.int8)[3:].view(param_step.exp_avg.shape)
        assert odd.data_ptr() % 16
        param_step.exp_avg = odd
        assert param_step.exp_avg_scale is not None
        for grid in (param_step, *param_step.factors):
            grid.exp_avg_sq = torch.zeros(*grid.exp_avg_sq.shape, 2)[..., 0]
        param_step.exp_avg_scale = torch.zeros(*param_step.exp_avg_scale.shape, 2)[..., 1]
    for number in range(3):
        for simulated in two:
            simulated.give(gradients(layouts, number, torch.float32))
            step([simulated])
    assert isinstance(engine, Compiled) and not engine._fallbacks
    for mine, other in zip(two[0].param_steps, two[1].param_steps, strict=True):
        assert torch.equal(mine.exp_avg, other.exp_avg) and torch.equal(mine.exp_avg_scale, other.exp_avg_scale)
        for one, another in zip((mine, *mine.factors), (other, *other.factors), strict=True):
            torch.testing.assert_close(one.exp_avg_sq, another.exp_avg_sq, rtol=1e-6, atol=0)
        torch.testing.assert_close(mine.param, other.param, rtol=1e-6, atol=1e-7, msg=mine.name)


def test_sums_that_travel_wider_than_they_are_computed() -> None:
    """A float64 parameter in the same buffer makes it float64: the float32 ones keep their engine, and their bits."""
    layouts = {name: LAYOUTS[name] for name in ("heads", "norm", "columns", "factored", "whole")}

    def world(wide: bool) -> list[SimulatedRank]:
        simulated_ranks = [SimulatedRank(layouts, engine_of("cpu"), ranks=3, rank=rank) for rank in range(3)]
        for grid in (
            grid
            for one in simulated_ranks
            for param_step in one.param_steps
            for grid in (param_step, *param_step.factors)
        ):
            if wide and grid.sums is not None:
                grid.own_sums, grid.sums = grid.own_sums.double(), grid.sums.double()
        for number in range(3):
            for one in simulated_ranks:
                one.give(gradients(layouts, number, torch.float32))
            step(simulated_ranks)
            assert not any(one.engine._fallbacks for one in simulated_ranks)
        return simulated_ranks

    for one, other in zip(world(False), world(True), strict=True):
        for mine, wide in zip(one.param_steps, other.param_steps, strict=True):
            assert torch.equal(mine.exp_avg_sq, wide.exp_avg_sq) and torch.equal(mine.param, wide.param), mine.name


def test_one_rank_whose_tensors_lie_otherwise_adds_in_the_same_order() -> None:
    """Layouts in memory are a rank's own: another engine there would add in another order than its neighbours."""
    layouts = {"convolution": BlockLayout.of((6, 3, 2, 5), None, None, None, None), "heads": LAYOUTS["heads"]}

    def irregular(x: Tensor) -> Tensor:
        return x.permute(*range(1, x.ndim), 0).contiguous().permute(-1, *range(x.ndim - 1))

    def world(odd: Callable[[Tensor], Tensor]) -> list[SimulatedRank]:
        stores = (torch.clone, odd, torch.clone)
        simulated_ranks = [
            SimulatedRank(layouts, engine_of("cpu"), ranks=3, rank=rank, store=stores[rank]) for rank in range(3)
        ]
        for number in range(3):
            for one in simulated_ranks:
                one.give(gradients(layouts, number, torch.float32))
            step(simulated_ranks)
        return simulated_ranks

    want, got = world(torch.clone), world(irregular)
    assert not got[1].named("convolution").param.is_contiguous()
    for one, other in zip(want, got, strict=True):
        for mine, theirs in zip(one.param_steps, other.param_steps, strict=True):
            assert torch.equal(mine.exp_avg_sq, theirs.exp_avg_sq) and torch.equal(mine.param, theirs.param), mine.name


# Refused, by name, and nothing changed


def shrunk(optimizer: AdamMini, w: Tensor) -> None:
    w.data = w.data[:16].clone()


def shrunk_in_place(optimizer: AdamMini, w: Tensor) -> None:
    w.data = w.data[:16]


def grown(optimizer: AdamMini, w: Tensor) -> None:
    w.data = torch.cat([w.data, w.data])


def other_state(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[AdamMini, Tensor], None]:
    def act(optimizer: AdamMini, w: Tensor) -> None:
        optimizer.state[w][key] = change(optimizer.state[w][key])

    return act


def released(key: str) -> Callable[[AdamMini, Tensor], None]:
    """As FSDP and offloading release memory: the shape stays."""

    def act(optimizer: AdamMini, w: Tensor) -> None:
        tensor = {"param": w.data, "grad": w.grad}.get(key) if key in ("param", "grad") else optimizer.state[w][key]
        assert tensor is not None
        tensor.untyped_storage().resize_(0)

    return act


def meta(x: Tensor) -> Tensor:
    return x.to("meta")


REFUSED: dict[str, tuple[Callable[[AdamMini, Tensor], None], str]] = {
    "pruned": (shrunk, "state of 'layers.1.w' has exp_avg of shape (64, 8), but the parameter, of shape (16, 8)"),
    "pruned, same address": (shrunk_in_place, "but the parameter, of shape (16, 8)"),
    "grown": (grown, "but the parameter, of shape (128, 8)"),
    "momentum of another shape": (other_state("exp_avg", lambda x: x[:16].clone()), "exp_avg of 'layers.1.w'"),
    "momentum of another dtype": (other_state("exp_avg", torch.Tensor.double), "exp_avg of 'layers.1.w'"),
    "moments of another shape": (other_state("exp_avg_sq", lambda x: x[:5].clone()), "exp_avg_sq of 'layers.1.w'"),
    "step of another dtype": (other_state("step", torch.Tensor.long), "step of 'layers.1.w'"),
    "momentum moved": (other_state("exp_avg", meta), "exp_avg of 'layers.1.w' is on meta"),
    "moments moved": (other_state("exp_avg_sq", meta), "exp_avg_sq of 'layers.1.w' is on meta"),
    "step moved": (other_state("step", meta), "step of 'layers.1.w' is on meta"),
    "parameter released": (released("param"), "memory of parameter 'layers.1.w'"),
    "gradient released": (released("grad"), "memory of gradient of 'layers.1.w'"),
    "momentum released": (released("exp_avg"), "memory of exp_avg of 'layers.1.w'"),
    "moments released": (released("exp_avg_sq"), "memory of exp_avg_sq of 'layers.1.w'"),
    "step released": (released("step"), "memory of step of 'layers.1.w'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_longer_fits_is_named_and_nothing_is_changed(what: str) -> None:
    act, words = REFUSED[what]
    params = {f"layers.{number}.w": torch.nn.Parameter(torch.ones(64, 8)) for number in range(3)}
    optimizer = AdamMini(params.items(), partition=by_rows("layers.*"), lr=0.1)
    for _ in range(2):
        for param in params.values():
            param.grad = torch.ones_like(param)
        optimizer.step()
    before = {name: param.detach().clone() for name, param in params.items()}
    steps = {name: float(optimizer.state[param]["step"]) for name, param in params.items()}
    w = params["layers.1.w"]
    for param in params.values():
        param.grad = torch.ones_like(param)
    act(optimizer, w)
    with pytest.raises(ValueError) as refused:
        optimizer.step()
    assert words in str(refused.value), refused.value
    for name, param in params.items():
        if param is not w:
            assert torch.equal(param, before[name]) and float(optimizer.state[param]["step"]) == steps[name]


def test_gradients_of_the_old_shape_are_named() -> None:
    """torch checks a gradient when it is assigned; not those that are there when a parameter changes."""
    param_step = SimulatedRank({"rows": LAYOUTS["rows"]}, engine_of("cpu")).param_steps[0]
    param_step.grad = torch.ones(36, 129)
    with pytest.raises(ValueError, match=r"the gradient of 'rows' is .* of shape \(36, 129\)"):
        check([param_step], False)


def test_memory_that_comes_back_is_used_where_it_is() -> None:
    """Offloaded between two phases and brought back: other addresses, the same values."""
    both = Steps({"w": (6, 8)})
    for _ in range(3):
        both.move()
        for param in both.params[0].values():
            for tensor in (param.data, both.optimizers[0].state[param]["exp_avg"]):
                kept, storage = tensor.clone(), tensor.untyped_storage()
                size = storage.nbytes()
                storage.resize_(0)
                held = torch.full((64,), torch.nan)  # in the place that was freed
                storage.resize_(size)
                tensor.copy_(kept)
                assert held.isnan().all()
        both.compare()


def works_on(device: str, step: str) -> ParamStep:
    """A factored parameter on a device."""
    (param_step,) = SimulatedRank({"factored": LAYOUTS["factored"]}, engine_of("cpu")).param_steps
    for key in ("param", "exp_avg", "exp_avg_sq"):
        setattr(param_step, key, getattr(param_step, key).to(device))
    param_step.factors = tuple(Factor(one.plan, one.exp_avg_sq.to(device)) for one in param_step.factors)
    param_step.grad, param_step.step = torch.ones_like(param_step.param), param_step.step.to(step)
    param_step.spec = None
    param_step.__post_init__()
    return param_step


def test_every_tensor_must_be_where_its_parameter_is() -> None:
    """The meta device stands for a GPU."""
    check([works_on("meta", "meta")], True)
    check([works_on("meta", "cpu")], False)
    for place, on_device in (("cpu", True), ("meta", False)):
        with pytest.raises(ValueError, match="step of 'factored' is on"):
            check([works_on("meta", place)], on_device)
    for key in ("grad", "exp_avg", "exp_avg_sq"):
        param_step = works_on("meta", "meta")
        setattr(param_step, key, torch.ones(getattr(param_step, key).shape))
        with pytest.raises(ValueError, match=r"of 'factored' is on cpu and the parameter on meta.*move it back"):
            check([param_step], True)
    for number, key in enumerate(("exp_avg_sq_col", "exp_avg_sq_mean")):
        param_step = works_on("meta", "meta")
        param_step.factors[number].exp_avg_sq = torch.ones(param_step.factors[number].exp_avg_sq.shape)
        with pytest.raises(ValueError, match=f"{key} of 'factored' is on cpu"):
            check([param_step], True)


def test_a_model_that_is_moved_or_converted_after_a_step_is_named() -> None:
    cases = ((meta, "on meta, but was torch.float32 on cpu"), (torch.Tensor.double, "float64 on cpu"))
    for change, words in cases:
        param_step = SimulatedRank({"rows": LAYOUTS["rows"]}, engine_of("cpu")).param_steps[0]
        param_step.grad = torch.ones_like(param_step.param)
        check([param_step], False)
        param_step.param, param_step.grad = change(param_step.param), change(param_step.grad)
        with pytest.raises(ValueError, match="'rows' is torch") as refused:
            check([param_step], False)
        assert words in str(refused.value)


def test_a_parameter_of_the_same_name_and_another_shape_is_planned_anew() -> None:
    """Groups that are exchanged for others: nothing is kept by name."""
    optimizer = AdamMini([("w", torch.nn.Parameter(torch.ones(6, 8)))], partition=by_rows("w"), lr=0.1)
    for shape in ((6, 8), (3, 4), (40, 5)):
        start = torch.randn(shape)
        new = torch.nn.Parameter(start.clone())
        optimizer.param_groups[0]["params"][0] = new
        oracle = Oracle({"w": start}, {"w": BlockLayout.of(shape, 1, None)})
        for _ in range(2):
            new.grad = torch.randn(shape)
            optimizer.step()
            oracle.step({"w": new.grad}, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay={"w": 1e-2})
        assert error(new.detach(), oracle.params["w"]) < 1e-6
