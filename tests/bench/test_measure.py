"""The parts of the measurement, without torchtitan: bytes, collectives, turns, failures."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan_adam_mini import Partition
from titan_adam_mini.bench import measure as measuring
from titan_adam_mini.bench.competitors import BASELINE, COMPETITORS, Competitor, chosen
from titan_adam_mini.bench.measure import Collectives, Measured, Result, bytes_moved, measure, stored_bytes
from titan_adam_mini.bench.rank_params import LocalParam, RankParams, Tensors, allocated

CPU = torch.device("cpu")
HYPER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def part(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> RankParams:
    """Plain linear layers of these shapes."""
    held = tuple(
        LocalParam(f"layers.{n}.feed_forward.w1.weight", shape, (shape[1], 1), shape, dtype)
        for n, shape in enumerate(shapes)
    )
    return RankParams("test", None, held, (), Partition.transformer(n_heads=2), HYPER, {"dim": 8, "n_heads": 2})


@pytest.fixture(autouse=True)
def small_copy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Little to copy, and little to look through for garbage, which is collected between optimizers."""
    monkeypatch.setitem(measuring.COPY_BYTES, "cpu", 2**16)
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def tensors() -> Iterator[Tensors]:
    with allocated(part((8, 16), (4, 8)), 1, 0, CPU) as tensors:
        yield tensors


def test_plain_tensors_and_dtensors_are_the_same_memory() -> None:
    """Rows of 5 over 4 ranks: the last has none of them, and the plain tensors leave that parameter out."""
    shapes, locals_ = ((5, 4), (8, 3)), ((0, 4), (2, 3))
    held = tuple(
        LocalParam(f"w{n}", shape, (shape[1], 1), local, torch.float32, 0, (Shard(0),))
        for n, (shape, local) in enumerate(zip(shapes, locals_, strict=True))
    )
    one = replace(part(), params=held, meshes=(([0, 1, 2, 3], ("fsdp",)),))
    assert (one.numel, one.bytes, one.sharded) == (6, 24, True)
    with allocated(one, 4, 3, CPU) as tensors:
        (_, empty), (name, whole) = tensors.sharded
        assert empty.shape == (5, 4) and empty.to_local().shape == (0, 4) and whole.shape == (8, 3)
        assert [name for name, _ in tensors.local] == [name] == ["w1"]
        plain = tensors.local[0][1]
        assert plain.data_ptr() == whole.to_local().data_ptr()
        assert plain.grad.data_ptr() == whole.grad.to_local().data_ptr() and plain.grad.abs().sum() > 0
    assert not dist.is_initialized()


def run(competitors: list[Competitor], tensors: Tensors, repeats: int = 4) -> Measured:
    return measure(competitors, part((8, 16), (4, 8)), tensors, CPU, repeats)


def named(name: str) -> Competitor:
    return next(one for one in COMPETITORS if one.name == name)


@pytest.mark.parametrize(
    ("param", "grad", "moments", "total"),
    [
        (4, 4, (4, 4), 28),  # AdamW, float32
        (4, 4, (4, 0), 20),  # AdamMini: second moments are next to nothing
        (4, 4, (2, 0), 16),  # its bfloat16 momentum
        (2, 2, (2, 2), 14),  # AdamW, bfloat16 throughout
        (4, 4, (1, 1), 16),  # two moments of 8 bits
    ],
)
def test_bytes_that_a_step_moves(param: int, grad: int, moments: tuple[int, int], total: int) -> None:
    p, g, (m, v) = param, grad, moments
    assert (p + g + m + v) + (p + m + v) == total, "reads p, g, m, v and writes p, m, v"
    assert bytes_moved(p, g, m + v) == total


class Quantized:
    """A state that is no tensor but holds some, as some 8-bit optimizers have."""

    def __init__(self) -> None:
        self.codes, self.scale, self.signed = torch.zeros(64, dtype=torch.int8), torch.zeros(2), True


def test_state_bytes_count_shared_memory_once_and_look_into_objects() -> None:
    table = torch.zeros(256)
    state = {"a": {"m": torch.zeros(10), "map": table, "step": 3}, "b": {"m": Quantized(), "map": table}, "c": None}
    assert stored_bytes(state) == 10 * 4 + 256 * 4 + 64 + 2 * 4
    flat = torch.zeros(100)
    assert stored_bytes([flat[:50], flat[50:]]) == 400


def test_collectives_are_counted_and_the_functions_put_back() -> None:
    own = dist.all_reduce
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    try:
        with Collectives() as seen:
            dist.all_reduce(torch.zeros(5))
            dist.all_reduce(tensor=torch.zeros(3, dtype=torch.float64), async_op=True).wait()
            dist.all_gather([torch.zeros(2) for _ in range(4)], torch.zeros(2))
    finally:
        dist.destroy_process_group()
    assert (seen.count, seen.bytes) == (3, 5 * 4 + 3 * 8 + 8 * 4)
    assert dist.all_reduce is own


def test_spread() -> None:
    assert Result("x", ms=[float(n) for n in range(11)]).spread() == (1.0, 5.0, 9.0)


def test_every_optimizer_takes_its_turn_with_a_state_of_its_own(tensors: Tensors) -> None:
    steps: list[str] = []

    def counted(name: str) -> Competitor:
        def build(params: Any, part: RankParams) -> Any:
            optimizer = named("AdamW fused").build(params, part)
            optimizer.register_step_post_hook(lambda *_: steps.append(name))
            return optimizer

        return Competitor(name, build)

    before = tensors.local[0][1].detach().clone()
    seen = run([counted("a"), counted("b")], tensors, repeats=3)
    assert steps[:6] == ["a"] * 3 + ["b"] * 3, "warm-up"
    assert sorted(steps[6:8]) == sorted(steps[8:10]) == sorted(steps[10:]) == ["a", "b"], "one step each a round"
    assert [len(one.ms) for one in (*seen.results, seen.copy)] == [3, 3, 3]
    assert not torch.equal(before, tensors.local[0][1]), "the steps were real"
    numel = 8 * 16 + 4 * 8
    assert [one.state_bytes for one in seen.results] == [8 * numel + 2 * 4] * 2, "two moments and a counter per tensor"
    assert "all states allocated at once" in seen.turns


def test_too_little_memory_for_all_states_holds_one_at_a_time(
    tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    free = iter([2**30, 2**30, 100])
    monkeypatch.setattr(measuring, "bytes_free", lambda _: next(free, 100))

    class Alive(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params)
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    def build(params: Any, part: RankParams) -> Any:
        assert not alive, "another one still is there"
        return Alive([param for _, param in params])

    seen = run([Competitor("a", build), Competitor("b", build), Competitor("c", build)], tensors, repeats=6)
    assert [(one.status, len(one.ms)) for one in seen.results] == [("measured", 6)] * 3, [r.note for r in seen.results]
    assert "one at a time, 4 rounds" in seen.turns and "left before b" in seen.turns


def test_who_is_missing_or_fails_is_a_row(tensors: Tensors) -> None:
    def wrong(params: Any, part: RankParams) -> Any:
        raise RuntimeError("no kernel for this\nand more")

    late = [0]

    def breaks(params: Any, part: RankParams) -> Any:
        optimizer = named("AdamW fused").build(params, part)

        def step(*_: Any) -> None:
            late[0] += 1
            if late[0] == 5:
                raise ValueError("the fifth step")

        optimizer.register_step_pre_hook(step)
        return optimizer

    missing = Competitor("missing", wrong, package="not-a-package", module="not_a_package.optim")
    rows = run([named(BASELINE), missing, Competitor("wrong", wrong), Competitor("breaks", breaks)], tensors).results
    told = [(one.status, one.note, len(one.ms)) for one in rows]
    assert told == [
        ("measured", "", 4),
        ("not installed", "", 0),
        ("failed", "RuntimeError: no kernel for this", 0),
        ("failed", "ValueError: the fifth step", 0),
    ]


def test_a_peer_whose_own_import_breaks_is_not_called_missing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_there.py").write_text("import surely_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="surely_not_there"):
        Competitor("half", named(BASELINE).build, module="half_there").installed()


def test_names_are_chosen_by_their_parts() -> None:
    one = part((8, 16))
    assert [row.name for row in chosen("torchao, FLASH", one)] == [
        BASELINE,
        "torchao AdamW8bit",
        "flashoptim FlashAdamW",
    ]
    assert len(chosen("", one)) == len(COMPETITORS) - 1, "nothing is a DTensor on one rank"
    with pytest.raises(ValueError, match="'lion' is in no name; the names are AdamW fused; "):
        chosen("AdamMini,lion", one)
