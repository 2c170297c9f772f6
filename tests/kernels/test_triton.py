"""The Triton engine: on a GPU where the tests are given one, else line by line in Triton's interpreter."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from math import prod
from typing import Any

import pytest
import torch
from on_device import DEVICE, Wrapper
from torch import Tensor

from titan_adam_mini import AdamMini, Partition, kernels
from titan_adam_mini.check.engines import LAYOUTS as EVERY
from titan_adam_mini.check.engines import SimulatedRank, gathered, gradients, reference_engine
from titan_adam_mini.check.engines import step as one_step
from titan_adam_mini.kernels import Factor, ParamStep, vectorized
from titan_adam_mini.kernels.tensorwise import Tensorwise
from titan_adam_mini.layout import BlockLayout
from titan_adam_mini.partition.roles import factors
from titan_adam_mini.plan import BlockPlan
from titan_adam_mini.sharding import Cut, Shard

triton = pytest.importorskip("titan_adam_mini.kernels.triton", reason="Triton has wheels for Linux only")

# What a decoder has, plus lines of every length class: 1, up to 64, one tile, several tiles with a rest, also of runs
# of int8. The interpreter takes some 20 ms per program, and strips of columns are programs.
SHAPES = {
    "tok_embeddings.weight": (3, 128),
    "layers.0.attention.wq.weight": (40, 48),
    "layers.0.attention.wk.weight": (16, 48),
    "layers.0.attention.wv.weight": (16, 48),
    "layers.0.feed_forward.w1.weight": (2, 2101),
    "layers.0.feed_forward.w2.weight": (2, 1152),
    "layers.0.attention_norm.weight": (1300,),
    "layers.0.attention.wq.bias": (1030,),
    "layers.0.moe.experts.w1": (2, 2, 128),
    "norm.weight": (1,),
}


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, `fused=True` is the Triton engine in the interpreter."""
    if DEVICE == "cuda":
        return
    monkeypatch.setattr(triton.TritonEngine, "device_type", "cpu")
    real = kernels.choose

    def choose(foreach: bool | None, fused: bool | None, capturable: bool, device: torch.device) -> Any:
        if fused:
            return triton.TritonEngine(Tensorwise("foreach", vectorized)), "fused (Triton)"
        return real(foreach, fused, capturable, device)

    monkeypatch.setattr(kernels, "choose", choose)


def parameters(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=random).to(DEVICE, dtype))
        for name, shape in shapes.items()
    }


def trained(
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    steps: int = 2,
    skip: str = "",
    **options: Any,
) -> tuple[dict[str, torch.nn.Parameter], AdamMini]:
    """Parameters after some steps with random gradients; the one called `skip` has none in the second."""
    params = parameters(shapes, dtype)
    optimizer = AdamMini(list(params.items()), **{"n_heads": 5, "n_kv_heads": 2, "lr": 1e-2, **options})
    random = torch.Generator().manual_seed(1)
    for step in range(steps):
        for name, param in params.items():
            value = torch.randn(param.shape, generator=random).to(DEVICE, dtype)
            param.grad = None if name == skip and step == 1 else value
        optimizer.step()
    return params, optimizer


def assert_close(one: Any, two: Any, tolerance: float, share: float = 0.0) -> None:
    """Parameters, moments and steps agree; `share` of the parameters may be one rounding apart."""
    (mine, left), (theirs, right) = one, two
    for name, param in mine.items():
        a, b = left.state[param], right.state[theirs[name]]
        assert float(a["step"]) == float(b["step"]), name
        torch.testing.assert_close(a["exp_avg_sq"], b["exp_avg_sq"], rtol=3e-6, atol=0, msg=name)
        apart = (param.float() - theirs[name].float()).abs() > tolerance
        assert apart.float().mean() <= share, f"{name}: {apart.float().mean():.1%} differ"


def case(momentum: torch.dtype | None, *marks: pytest.MarkDecorator, **options: Any) -> Any:
    """Parameters whose columns do not fill runs of int8 keep float32 momentum beside the others."""
    options["momentum_dtype"] = momentum
    return pytest.param(options, id=str(options), marks=marks)


@pytest.mark.parametrize(
    "options",
    [
        case(None, value_blocks="tensor", maximize=True, weight_decay=0.3),
        case(torch.bfloat16, pytest.mark.slow, second_moment="channels"),
        case(torch.int8, second_moment="factored", weight_decay=0.3),
        case(torch.int8, pytest.mark.slow, maximize=True),
        case(torch.bfloat16, pytest.mark.slow, second_moment="factored", maximize=True),
        case(None, pytest.mark.slow, second_moment="channels"),
    ],
)
def test_it_computes_what_torch_computes(options: dict[str, Any]) -> None:
    fast, plain = trained(SHAPES, fused=True, **options), trained(SHAPES, foreach=True, **options)
    assert fast[1].engine.launches > 0 and not fast[1].engine._fallbacks
    assert_close(fast, plain, 1e-6 if options["momentum_dtype"] is None else 1e-3)


@pytest.mark.parametrize(
    "options",
    [
        case(torch.int8, pytest.mark.slow, stochastic_rounding=True),
        case(None),
        case(None, pytest.mark.slow, second_moment="factored"),
        case(None, pytest.mark.slow, stochastic_rounding=True),
        case(torch.int8, pytest.mark.slow, second_moment="factored", stochastic_rounding=True),
    ],
)
def test_bfloat16_parameters(options: dict[str, Any]) -> None:
    """Rounded as torch rounds, or with the very same random bits; a last bit of the sums may tip a rounding."""
    fast, plain = (trained(SHAPES, torch.bfloat16, **one, **options) for one in ({"fused": True}, {"foreach": True}))
    assert_close(fast, plain, 0.0, share=2e-3)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="the tensors are on the CPU; the other tests compare on the device")
@pytest.mark.parametrize(("dtype", "momentum"), [(torch.float32, None), (torch.bfloat16, torch.int8)], ids=str)
def test_every_layout_as_the_reference_has_it(dtype: torch.dtype, momentum: torch.dtype | None) -> None:
    layouts = {name: layout for name, layout in EVERY.items() if prod(layout.shape) < 6_000}
    engine = triton.TritonEngine(Tensorwise("foreach", vectorized))
    two = [SimulatedRank(layouts, one, dtype=dtype, momentum=momentum) for one in (engine, reference_engine())]
    for number in range(2):
        for simulated in two:
            simulated.give(gradients(layouts, number, dtype))
            one_step([simulated])
    assert set(engine._fallbacks) <= {"no columns", "elements", "fused columns"}, engine._fallbacks
    for mine, other in zip(two[0].param_steps, two[1].param_steps, strict=True):
        assert torch.equal(mine.exp_avg, other.exp_avg), f"{mine.name}: momentum has nothing to add up"
        torch.testing.assert_close(mine.exp_avg_sq, other.exp_avg_sq, rtol=1e-6, atol=0, msg=mine.name)
        tight = 1e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(mine.param, other.param, rtol=tight, atol=tight / 10, msg=mine.name)


def test_missing_gradients_leave_a_parameter_alone() -> None:
    name = "layers.0.attention.wq.weight"
    shapes = {one: SHAPES[one] for one in (name, "tok_embeddings.weight", "norm.weight")}
    fast, plain = (trained(shapes, steps=3, skip=name, **one) for one in ({"fused": True}, {"foreach": True}))
    assert float(fast[1].state[fast[0][name]]["step"]) == 2
    assert_close(fast, plain, 1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_poisons_its_block_and_no_other(value: float) -> None:
    params = parameters({"w1.weight": (4, 3000), "attention.wq.weight": (10, 48)}, torch.float32)
    optimizer = AdamMini(list(params.items()), n_heads=5, n_kv_heads=2, fused=True)
    for param in params.values():
        param.grad = torch.ones_like(param)
        param.grad[3, 7] = value
    optimizer.step()
    bad = {name: param.isnan().any(1).tolist() for name, param in params.items()}
    assert bad["w1.weight"] == [False, False, False, True]
    moments = optimizer.state[params["attention.wq.weight"]]["exp_avg_sq"].flatten().isfinite().tolist()
    assert moments == [True, False, True, True, True], "rows 2 and 3 are the second head"


def test_291_tensors_take_as_many_launches_as_3(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"norm.weight": (48,), "layers.0.attention.wq.weight": (20, 96), "layers.0.feed_forward.w1.weight": (2, 96)}
    many = {f"layers.{n}.{name.removeprefix('layers.0.')}": shape for n in range(97) for name, shape in few.items()}
    many["layers.9.feed_forward.w1.weight"] = (2, 2500)
    launched: list[str] = []

    class Counted:
        """A kernel that only says that it was launched."""

        def __init__(self, name: str) -> None:
            self.name, self.arg_names = name, ()

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **constants: launched.append(self.name)

    for name in ("prepare", "one_line_blocks", "line_sums", "fold", "update_lines"):
        monkeypatch.setattr(triton.triton_kernels, name, Counted(name))
    counts = []
    for shapes in (few, many):
        trained(shapes, steps=1, fused=True)
        counts.append(sorted(launched))
        launched.clear()
    assert len(many) == 291 and counts[0] == counts[1] and len(counts[0]) == 7, counts


@pytest.mark.slow
def test_transposed_tensors_have_lines_of_their_own() -> None:
    """Columns that are blocks, one by one and in heads; a gradient that lies in memory as its parameter does not."""
    shapes = {"h.0.attn.c_attn.weight": (70, 3 * 25), "h.0.mlp.c_fc.weight": (70, 66), "w.weight": (5, 90)}
    roles = {"*c_attn*": "query_key.T", "*c_fc*": "neuron.T", "w*": "neuron"}
    partition = Partition.transformer(n_heads=15, roles=roles)

    def run(**options: Any) -> tuple[dict[str, torch.nn.Parameter], AdamMini]:
        params = parameters(shapes, torch.float32)
        optimizer = AdamMini(list(params.items()), lr=1e-2, partition=partition, **options)
        for step in range(2):
            for number, param in enumerate(params.values()):
                random = torch.Generator().manual_seed(10 * step + number)
                grad = torch.randn(param.shape, generator=random).to(DEVICE)
                param.grad = grad.t().contiguous().t() if number == 2 else grad
            optimizer.step()
        return params, optimizer

    fast, plain = run(fused=True), run(foreach=True)
    assert not fast[1].engine._fallbacks
    assert_close(fast, plain, 1e-6)


def test_a_replaced_local_tensor_and_new_gradients_are_found() -> None:
    """FSDP2 puts another tensor in the place of an uneven shard's; every backward pass brings new gradients."""
    shapes = {name: shape for name, shape in SHAPES.items() if "w1" not in name}
    fast, plain = (parameters(shapes, torch.float32) for _ in range(2))
    optimizers = [
        AdamMini(list(params.items()), n_heads=5, n_kv_heads=2, lr=1e-2, **{flag: True})
        for params, flag in ((fast, "fused"), (plain, "foreach"))
    ]
    held = []
    for step in range(3):
        for params in (fast, plain):
            for number, param in enumerate(params.values()):
                if step == 1:
                    held.append(param.data)
                    param.data = param.data.clone()
                random = torch.Generator().manual_seed(100 * step + number)
                held.append(torch.randn(param.shape, generator=random).to(DEVICE))  # an address of its own
                param.grad = held[-1]
        for optimizer in optimizers:
            optimizer.step()
    assert_close((fast, optimizers[0]), (plain, optimizers[1]), 1e-6)


def test_the_storage_of_a_wrapper_is_updated() -> None:
    """torchao's float8 all-gather wraps the local tensor: its own address is 0, the data are in an inner tensor."""
    inner = torch.ones(4, 96, device=DEVICE)
    param = torch.nn.Parameter(Wrapper(inner))
    assert param.data_ptr() == 0
    optimizer = AdamMini([("w1.weight", param)], fused=True)
    param.grad = torch.ones(4, 96, device=DEVICE)
    optimizer.step()
    assert not inner.eq(1).any()


@pytest.mark.slow
def test_nothing_grows_from_step_to_step() -> None:
    params = parameters({"w1.weight": (2, 96), "norm.weight": (8,)}, torch.float32)
    optimizer = AdamMini(list(params.items()), fused=True)
    tensors = []
    for step in range(10):
        for param in params.values():
            param.grad = torch.randn_like(param) if step % 3 or param.ndim == 2 else None
        optimizer.step()
        for param in params.values():
            param.grad = None
        if step in (3, 9):
            gc.collect()
            tensors.append(sum(isinstance(one, Tensor) for one in gc.get_objects()))
    assert tensors[1] <= tensors[0], "gradients, tables or copies are kept"


LAYOUTS = {
    "rows": BlockLayout.of((8, 300), 1, None),
    "heads": BlockLayout.of((8, 2100), 4, None),
    "norm": BlockLayout.of((1500,), None),
    "fused": BlockLayout.of((9, 96), [(2, 3), (3, 1)], None),
    "experts": BlockLayout.of((4, 2, 130), 1, 1, None),
    "bias": BlockLayout.of((33,), 1),
    "columns": BlockLayout.of((40, 30), None, 1),
    "experts by columns": BlockLayout.of((2, 5, 70), 1, None, 1),
    "factored": BlockLayout.of((5, 70), 1, None),
    "factored experts": BlockLayout.of((3, 5, 30), 1, 1, None),
}


FAST = {"rows", "norm", "fused", "columns", "experts by columns", "factored"}


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        *(pytest.param(name, 3, marks=() if name in FAST else pytest.mark.slow) for name in LAYOUTS),
        *(pytest.param(name, 5, marks=pytest.mark.slow) for name in LAYOUTS),
    ],
)
def test_any_number_of_ranks_gives_the_bits_of_one(name: str, ranks: int) -> None:
    """Ranks simulated one after another, their sums added by hand, gradients at odd addresses."""
    layout = LAYOUTS[name]
    random = torch.Generator().manual_seed(3)
    start = torch.randn(layout.shape, generator=random)
    grads = [torch.randn(layout.shape, generator=random) for _ in range(2)]
    factored = name.startswith("factored")
    want = simulate(layout, 1, start, grads, factored)
    got = simulate(layout, ranks, start, grads, factored)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="the tensors are on the CPU; the other tests compare on the device")
def test_a_rank_may_have_rows_of_one_matrix_and_none_of_another() -> None:
    layouts = {"factored": BlockLayout.of((7, 70), 1, None), "factored, short": BlockLayout.of((2, 70), 1, None)}
    layouts["columns"] = BlockLayout.of((2, 70), None, 1)

    def world(ranks: int) -> list[SimulatedRank]:
        engines = [triton.TritonEngine(Tensorwise("foreach", vectorized)) for _ in range(ranks)]
        simulated_ranks = [
            SimulatedRank(layouts, engine, ranks=ranks, rank=rank) for rank, engine in enumerate(engines)
        ]
        for number in range(2):
            for one in simulated_ranks:
                one.give(gradients(layouts, number, torch.float32))
            one_step(simulated_ranks)
        return simulated_ranks

    (want,), got = world(1), world(3)
    assert not got[2].named("columns").param.numel()
    for index, param_step in enumerate(want.param_steps):
        assert torch.equal(gathered(got, index, "param"), param_step.param), param_step.name


@pytest.mark.parametrize("types", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_gradients_may_have_another_type(types: tuple[torch.dtype, torch.dtype]) -> None:
    layout, random = LAYOUTS["heads"], torch.Generator().manual_seed(3)
    start = torch.randn(layout.shape, generator=random).to(types[0])
    grads = [torch.randn(layout.shape, generator=random).to(types[1])]
    got = simulate(layout, 1, start, grads)
    want = simulate(layout, 1, start.float(), [one.float() for one in grads])
    assert got[0].dtype == types[0] and torch.equal(got[0], want[0].to(types[0]))


def simulate(
    layout: BlockLayout, ranks: int, start: Tensor, grads: list[Tensor], factored: bool = False
) -> list[Tensor]:
    """Parameter and momentum after steps of `ranks` FSDP ranks, put together."""
    group = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
    shards = [Shard(layout.shape, (Cut(0, 0, ranks, rank),) if ranks > 1 else ()) for rank in range(ranks)]
    plans = [BlockPlan.of(layout, shard) for shard in shards]
    engines = [triton.TritonEngine(Tensorwise("foreach", vectorized)) for _ in plans]
    param_steps = []

    def sums_of(plan: BlockPlan) -> Tensor | None:
        kind = torch.float64 if plan.of_columns else torch.float32
        return torch.zeros(plan.sums_shape, device=DEVICE, dtype=kind) if plan.axes else None

    for plan, shard in zip(plans, shards, strict=True):
        own = tuple(slice(*interval) for interval in plan.own[0])
        sums = sums_of(plan)
        others = [BlockPlan.of(one, shard) for one in factors(layout.shape)] if factored else []
        grids = [(one, torch.zeros(one.grid_shape, device=DEVICE), sums_of(one)) for one in others]
        part = start[own].clone().to(DEVICE)
        param_steps.append(
            ParamStep(
                name="w",
                plan=plan,
                param=part,
                grad=None,
                exp_avg=torch.zeros_like(part),
                exp_avg_scale=None,
                exp_avg_sq=torch.zeros(plan.grid_shape, device=DEVICE),
                step=torch.zeros((), device=DEVICE),
                group=group,
                decay=True,
                own_sums=sums,
                sums=sums,
                factors=tuple(Factor(one, grid, sums, sums) for one, grid, sums in grids),
            )
        )
    for grad in grads:
        for rank, (param_step, plan, engine) in enumerate(zip(param_steps, plans, engines, strict=True)):
            own = tuple(slice(*interval) for interval in plan.own[0])
            value = grad[own].to(DEVICE)
            memory = torch.empty(value.numel() + rank, device=DEVICE, dtype=value.dtype)[rank:]
            param_step.grad = memory.copy_(value.reshape(-1)).view(value.shape)
            for one in (param_step, *param_step.factors):
                if one.own_sums is not None:
                    one.own_sums.zero_()
            if param_step.waits and value.numel():
                engine.square_sums([param_step])
        for same in zip(*((param_step, *param_step.factors) for param_step in param_steps), strict=True):
            if same[0].sums is not None:
                total = torch.stack([one.sums for one in same]).sum(0)
                for one in same:
                    one.sums.copy_(total)
        for param_step, engine in zip(param_steps, engines, strict=True):
            engine.update([param_step])
            param_step.squares = None
    return [torch.cat([getattr(param_step, key) for param_step in param_steps]) for key in ("param", "exp_avg")]
