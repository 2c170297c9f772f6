"""Snapshots: the peak found from the end backwards is the one in the allocator's own books; the format is torch's."""

import inspect
import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.cuda import _memory_viz

import titan_adam_mini
from titan_adam_mini import AdamMini
from titan_adam_mini.cli import main
from titan_adam_mini.exchange import Exchange
from titan_adam_mini.memory.snapshot import TENSORS_KEY, _device, read, summarize
from titan_adam_mini.momentum import empty_momentum
from titan_adam_mini.state import new_state

from .allocator import MIB, Allocator, expected, frame

SITE = "/env/lib/python3.11/site-packages"


def own(function: Callable[..., Any]) -> dict[str, Any]:
    """The frame of a function of this package, wherever it stands today."""
    code = inspect.unwrap(function).__code__
    path = Path(code.co_filename).relative_to(Path(titan_adam_mini.__file__).parent.parent)
    return frame(f"{SITE}/{path}", code.co_name, code.co_firstlineno)


TRAIN = frame(f"{SITE}/torchtitan/train.py", "train_step", 561)
FORWARD = [frame(f"{SITE}/torch/nn/modules/module.py", "_call_impl", 1784), TRAIN]
ENGINE = [frame("??", "torch::autograd::Engine::evaluate_function(std::shared_ptr<torch::autograd::GraphTask>&)", 0)]
COLLECTIVES = f"{SITE}/torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py"
GATHER = [frame(COLLECTIVES, "allocate", 59), frame(COLLECTIVES, "foreach_all_gather", 351)]
RECOMPUTE = frame(f"{SITE}/torch/utils/checkpoint.py", "recompute_fn", 1657)
STACKS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    # tag: category, stack
    "activation": ("activations", [frame("??", "at::_ops::mm::call", 0), *FORWARD]),
    "recomputed": ("activations", [RECOMPUTE, *FORWARD, *ENGINE]),
    "gathered": ("all-gather", [*GATHER, *FORWARD]),
    "scattered": ("reduce-scatter", [frame(COLLECTIVES, "foreach_reduce", 597), *ENGINE]),
    "backward": ("temporaries", ENGINE),
    "adamw": ("optimizer state", [frame(f"{SITE}/torch/optim/adam.py", "_init_group", 160), TRAIN]),
    "stepping": ("temporaries", [frame(f"{SITE}/torch/optim/adam.py", "_multi_tensor_adam", 600), TRAIN]),
    "exchanged": ("temporaries", [own(Exchange.start), own(AdamMini.step), TRAIN]),
    "adam-mini": ("optimizer state", [own(empty_momentum), own(new_state), own(AdamMini.step), TRAIN]),
    "batch": ("other", [frame(f"{SITE}/torchtitan/train.py", "train_step", 540)]),
    "weight": ("parameters", []),
}
CATEGORIES = {tag: category for tag, (category, _) in STACKS.items()}

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("alloc"), st.integers(1, 3 * MIB) | st.integers(1, 40 * MIB), st.sampled_from(list(STACKS))),
        st.tuples(st.sampled_from(["free", "free later"]), st.integers(0, 50), st.none()),
        st.tuples(st.sampled_from(["complete", "empty", "oom", "record"]), st.none(), st.none()),
    ),
    max_size=80,
)


def play(operations: list[tuple[str, Any, Any]]) -> Allocator:
    """An allocator that has done all this; recording begins at the first "record"."""
    books = Allocator()
    for action, number, tag in operations:
        alive = sorted(books.open)
        if action == "alloc":
            books.alloc(number, tag, STACKS[tag][1])
        elif action.startswith("free") and alive:
            books.free(alive[number % len(alive)], later=action == "free later")
        elif action == "complete" and books.pending():
            books.complete(books.pending()[0])
        elif action == "empty":
            books.empty_cache()
        elif action == "oom":
            books.fail(80 * MIB)
        elif action == "record" and not books.recording:
            books.record()
    if not books.recording:
        books.record()
    return books


@settings(max_examples=100, deadline=None)
@given(OPERATIONS, st.none() | st.integers(0, 60))
def test_what_is_found_is_what_the_books_have(operations: list[tuple[str, Any, Any]], kept: int | None) -> None:
    books = play([("alloc", 1000, "weight"), *operations])
    held = [(one.address, one.size, "parameters") for one in books.open.values() if one.tag == "weight"]
    data = {**books.snapshot(kept), TENSORS_KEY: {"optimizer": "AdamW", "tensors": held}}
    assume(data["segments"] or data["device_traces"][0])
    found = summarize(_device(Path("built"), pickle.loads(pickle.dumps(data)), None))

    first = 0 if kept is None else max(0, len(books.entries) - kept)
    states = books.books[first:]
    assert found.peak.allocated == max(requested for requested, _ in states)
    assert found.peak_reserved == max(reserved for _, reserved in states)
    assert (found.end.allocated, found.end.reserved) == states[-1]
    assert (found.peak.allocated, found.peak.reserved) == states[found.peak_entry]
    assert (found.unmatched, found.strangers, found.entries) == (0, 0, len(states) - 1)
    assert found.allocations == sum(one["action"] == "alloc" for one in books.entries[first:])
    assert found.ooms == sum(one["action"] == "oom" for one in books.entries[first:])

    addresses = {address for address, _, _ in held}
    for moment, state in ((found.end, len(books.entries)), (found.peak, first + found.peak_entry)):
        assert Counter(moment.categories) == expected(books, state, first, addresses, CATEGORIES)
        assert sum(moment.categories.values()) == moment.allocated

    blocks = [block for segment in books.segments for block in segment.blocks]
    in_use = [block for block in blocks if block.state == "active_allocated"]
    assert found.rounding == sum(block.size - block.requested for block in in_use)
    assert found.awaiting == sum(block.size for block in blocks if block.state == "active_pending_free")
    assert found.end.reserved == found.end.allocated + found.rounding + found.awaiting + found.free
    assert found.largest_free == max((block.size for block in blocks if block.state == "inactive"), default=0)


@settings(max_examples=50, deadline=None)
@given(OPERATIONS)
def test_torchs_own_reader_takes_the_built_files(operations: list[tuple[str, Any, Any]]) -> None:
    """torch's checks of sizes hold, and its flame graph sums to the same bytes."""
    books = play([("alloc", 1000, "weight"), *operations])
    data = books.snapshot()
    assume(data["segments"] or data["device_traces"][0])
    assert f"segments: {len(books.segments)}" in _memory_viz.segsum(data)
    assert "entries" in _memory_viz.trace(data) or not books.entries
    assert "MemoryViz" in _memory_viz.trace_plot(data)
    lines = _memory_viz.memory(data, format_flamegraph=lambda text: text).splitlines()
    sizes: Counter[str] = Counter()
    for line in lines:
        words, _, size = line.rpartition(" ")
        sizes[words.split(";")[1] + (" gap" if words.endswith("<gaps>") else "")] += int(size)
    found = summarize(_device(Path("built"), data, None))
    assert sizes["active_allocated"] == found.end.allocated
    assert sizes["active_allocated gap"] == found.rounding
    assert sizes["inactive"] + sizes["inactive gap"] == found.free


def run(state: int, name: str, first: int = 6) -> dict[str, Any]:
    """The snapshot of two training steps with parameters of 8 MiB and this much optimizer state, in MiB; a layer saves
    `first` MiB in the first step, 6 MiB in the second."""
    books = Allocator()
    held = []
    for _ in range(4):
        held.append((books.alloc(2 * MIB, "weight"), 2 * MIB, "parameters"))
    if name == "AdamMini":  # its state is made when the optimizer is built, before recording begins
        held.append((books.alloc(state * MIB, "state"), state * MIB, "optimizer state"))
    books.record()
    reduced = [frame(COLLECTIVES, "foreach_reduce", 612), *ENGINE]
    gradients: list[int] = []
    for step in range(2):
        for address in gradients:
            books.free(address)
        gradients = []
        saved = [books.alloc((6 if step else first) * MIB, "activation", STACKS["activation"][1]) for _ in range(3)]
        for address in reversed(saved):
            buffer = books.alloc(4 * MIB, "scattered", STACKS["scattered"][1])
            gradients.append(books.alloc(2 * MIB, "gradient", reduced))
            books.free(address)
            books.free(buffer, later=True)
            books.complete(buffer)
        if name == "AdamW" and step == 0:  # its state is made in the first step
            held.append((books.alloc(state * MIB, "adamw", STACKS["adamw"][1]), state * MIB, "optimizer state"))
        books.free(books.alloc(MIB, "stepping", STACKS["stepping"][1]))
    held += [(address, 2 * MIB, "gradients") for address in gradients]
    return {**books.snapshot(), TENSORS_KEY: {"optimizer": name, "tensors": held}}


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "adamw.pickle", tmp_path / "adam_mini.pickle"
    for path, (state, name) in zip(paths, ((16, "AdamW"), (8, "AdamMini")), strict=True):
        path.write_bytes(pickle.dumps(run(state, name)))
    return paths


@pytest.mark.parametrize(("first", "step"), [(6, 1), (7, 0)])
def test_gradients_of_earlier_steps_are_known_by_the_line_that_made_the_last(first: int, step: int) -> None:
    """Without what the run holds they are reduce-scatter buffers, made in the same function."""
    data = run(8, "AdamMini", first)
    found = summarize(_device(Path("built"), data, None))
    assert (found.peak_entry > found.entries / 2) == step, "in which step the peak is"
    saved = 3 * first * MIB
    assert found.peak.categories == {
        "parameters": 8 * MIB,
        "optimizer state": 8 * MIB,
        "activations": saved,
        "gradients": 2 * MIB,
        "reduce-scatter": 4 * MIB,
    }
    assert found.end.categories["gradients"] == 6 * MIB
    del data[TENSORS_KEY]
    bare = summarize(_device(Path("built"), data, None))
    assert bare.peak.allocated == found.peak.allocated
    assert bare.peak.categories == {"activations": saved, "reduce-scatter": 6 * MIB, "other": 16 * MIB}
    assert bare.peak.without_frames == bare.end.without_frames == 16 * MIB


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    main(["snapshot", *words])
    return capsys.readouterr().out


def test_two_columns_json_and_picture(two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = two[0].with_name("out.json"), two[0].with_name("out.png")
    text = told([str(two[0]), str(two[1]), "--json", str(out), "--plot", str(picture)], capsys)
    rows = {line.strip()[:24].strip(): line.split()[-3:] for line in text.splitlines() if line.startswith(" ")}
    assert rows["optimizer state"] == ["16.0", "8.0", "-8.0"]
    assert "MiB" in text and "B - A" in text and "AdamW" in text and "Peak after entry" in text
    figures = json.loads(out.read_text())
    assert figures["unit"] == "bytes" and figures["B"]["optimizer"] == "AdamMini"
    assert figures["A"]["end"]["categories"]["optimizer state"] == 16 * MIB
    assert figures["A"]["peak"]["allocated"] == summarize(read(two[0])).peak.allocated
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_one_file_needs_no_second(two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert "B - A" not in told([str(two[0])], capsys)


def test_how_far_the_trace_reaches_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    books = Allocator()
    books.record()
    books.free(books.alloc(30 * MIB, "batch", STACKS["batch"][1]))
    last = books.alloc(MIB, "batch", STACKS["batch"][1])
    path = tmp_path / "a.pickle"
    path.write_bytes(pickle.dumps(books.snapshot()))
    assert "the last 6 entries" in told([str(path)], capsys)
    path.write_bytes(pickle.dumps(books.snapshot(kept=3)))
    text = told([str(path)], capsys)
    assert "the last 3 entries" in text and "does not name parameters" in text
    assert summarize(read(path)).peak.allocated == MIB, "what was freed before the trace is not known"
    path.write_bytes(pickle.dumps(books.snapshot(kept=0)))
    assert "It has no trace" in told([str(path)], capsys)
    books.free(last)
    path.write_bytes(pickle.dumps(books.snapshot(kept=2)))
    assert "The peak is before the first entry" in told([str(path)], capsys)


def test_entries_and_tensors_that_do_not_fit_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    books = play([("record", None, None), ("alloc", MIB, "batch")])
    data = books.snapshot()
    data["device_traces"][0].append({"action": "alloc", "addr": 1, "size": 5, "stream": 0, "frames": []})
    data[TENSORS_KEY] = {"optimizer": "AdamW", "tensors": [(7, 64, "parameters")]}
    path = tmp_path / "a.pickle"
    path.write_bytes(pickle.dumps(data))
    text = told([str(path)], capsys)
    assert (
        "1 entries are inconsistent with the blocks" in text
        and "64 bytes of the tensors that it names are in no block" in text
    )


class Trap:
    """A pickle that would run something."""

    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_other_files_are_refused_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = run(8, "AdamMini")
    other = Allocator(device=2)
    other.alloc(MIB, "weight")
    both = {"segments": good["segments"] + other.snapshot()["segments"], "device_traces": good["device_traces"]}
    no_size = {**good, "segments": [{**good["segments"][0], "total_size": "large"}]}
    no_blocks = {**good, "segments": [{key: one for key, one in good["segments"][0].items() if key != "blocks"}]}
    path = tmp_path / "a.pickle"
    for content, words in (
        (None, "cannot be read: No such file"),
        (b"", "is empty"),
        (pickle.dumps(good)[:-100], "is damaged, or not a pickle"),
        (b"no pickle at all", "is damaged, or not a pickle"),
        (pickle.dumps({"segments": Trap()}), "print, and a snapshot has"),
        (pickle.dumps([1, 2]), "not a memory snapshot of torch"),
        (pickle.dumps({"model": 1}), "not a memory snapshot of torch (KeyError: 'segments')"),
        (pickle.dumps(no_size), "total_size is 'large'"),
        (pickle.dumps(no_blocks), "(KeyError: 'blocks')"),
        (pickle.dumps({"segments": [], "device_traces": [[]]}), "is an empty snapshot"),
        (pickle.dumps(both), "has devices 0, 2: choose one with --device N"),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(SystemExit) as ended:
            main(["snapshot", str(path)])
        assert ended.value.code == 1
        printed = capsys.readouterr()
        error = " ".join(printed.err.split())
        assert error.startswith("titan-adam-mini: ") and words in error and "executed" not in printed.out, error
        assert error.count(str(path)) == 1, error
    assert "device 2" in told([str(path), "--device", "2"], capsys)
    with pytest.raises(ValueError, match="has nothing of device 1: it has 0, 2"):
        read(path, 1)


def test_unknown_flags_are_refused(two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["snapshot", str(two[0]), "--model.flavor=8B"])
    assert ended.value.code == 2 and "--model.flavor=8B" in capsys.readouterr().err
