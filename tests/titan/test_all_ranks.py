"""What fails on one rank alone is one sentence on every rank, and none waits for the others for ever."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from meshes import MESHES
from ranks import RankError, run

from titan_adam_mini.check.injected import values
from titan_adam_mini.check.meshes import Placed, full_shapes

MESH, STEP, RANKS = "FSDP2 2", 3, 2
DEADLINE = 90.0


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("no copies of this")
        self.held = lambda: None


def told(work: Callable[[], Any]) -> tuple[str, str]:
    """The kind of exception that this rank raised, and what it said; "" if none."""
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


# The agreement


def raised(kind: str) -> None:
    from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

    if kind == "unpicklable":
        raise Unpicklable
    if kind == "of torch's checkpoint":
        raise CheckpointException("write", {2: _wrap_exception(OSError(errno.EIO, "broken"))})
    if kind:
        raise {"refused": ValueError, "key": KeyError, "stale": OSError}[kind](f"{kind} here")


ALL = dict.fromkeys(range(3), "refused")
CASES: list[tuple[dict[int, str], str, str]] = [
    ({}, "", ""),
    ({1: "refused"}, "ValueError", "rank 1: refused here"),
    (ALL, "ValueError", "refused here"),
    ({2: "stale"}, "RuntimeError", "rank 2 could not open the box: OSError: stale here"),
    ({1: "unpicklable"}, "RuntimeError", "rank 1 could not open the box: Unpicklable: no copies of this"),
    (
        {1: "key", 2: "refused"},
        "RuntimeError",
        "rank 1 could not open the box: KeyError: 'key here' (and 1 more of 3 ranks failed)",
    ),
    (
        dict.fromkeys(range(3), "of torch's checkpoint"),
        "RuntimeError",
        "rank 2 could not open the box: OSError: [Errno 5] broken",
    ),
]
"""What fails on which rank, and what every rank raises."""


def agree(rank: int, world: int) -> Any:
    from titan_adam_mini.titan.all_ranks import failing_together, gathered

    def work(kind: str) -> None:
        with failing_together("open the box"):
            raised(kind)

    return [(told(lambda kinds=kinds: work(kinds.get(rank, ""))), gathered(rank * 10)) for kinds, _, _ in CASES]


def test_one_rank_fails_and_every_rank_says_so_in_the_same_words() -> None:
    wanted = [((kind, sentence), [0, 10, 20]) for _, kind, sentence in CASES]
    assert run(agree, 3, timeout=DEADLINE) == [wanted] * 3


def nested(rank: int, world: int, when: int) -> Any:
    from titan_adam_mini.titan.all_ranks import failing_together, gathered

    def work() -> None:
        with failing_together("do it all"):
            for place in range(4):
                if rank == 1 and place == when:
                    raise OSError("gone")
                with failing_together("do a part"):
                    pass
                gathered(place)

    return told(work), gathered(rank)


@pytest.mark.parametrize("when", [0, 2])
def test_a_rank_may_fail_between_two_agreements(when: int) -> None:
    answers = run(nested, 2, when, timeout=DEADLINE)
    assert answers == [(("RuntimeError", "rank 1 could not do it all: OSError: gone"), [0, 1])] * 2


def stopped(rank: int, world: int) -> None:
    from titan_adam_mini.titan.all_ranks import failing_together

    with failing_together("go on"):
        if rank == 1:
            raise SystemExit(3)


def test_a_rank_that_is_to_end_waits_for_nobody() -> None:
    """The pool catches the exit, where a trainer's process would end and take the others along."""
    with pytest.raises(RankError, match=r"rank \[1\] of 2: [\s\S]*SystemExit: 3"):
        run(stopped, 2, timeout=DEADLINE)


# The checkpointer


def manager(kind: str, folder: str) -> Any:
    """Our checkpointer around the decoder and its optimizer, as the trainer makes it."""
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.components.lr_scheduler import LRSchedulersContainer
    from torchtitan.components.optimizer import OptimizersContainer
    from torchtitan.config import Checkpoint

    from titan_adam_mini import AdamMini
    from titan_adam_mini.titan.builder import AdamMiniContainer
    from titan_adam_mini.titan.knobs import Knobs

    mesh = MESHES[MESH]
    placed = Placed.decoder(mesh, torch.float32).fill(values(full_shapes(mesh.sizes)))
    if kind == "AdamW":
        container = OptimizersContainer([placed.module], torch.optim.AdamW, {"lr": 1e-2})
    else:
        sizes = mesh.sizes
        heads = {"n_heads": sizes.n_heads, "n_kv_heads": sizes.n_kv_heads, "head_dim": sizes.head_dim}
        optimizer = AdamMini(list(placed.module.named_parameters()), lr=1e-2, **heads)
        container = AdamMiniContainer([placed.module], [optimizer], Knobs(load_adamw_state=True))
    return CheckpointManager(
        dataloader=None,
        model_parts=[placed.module],
        optimizers=container,
        lr_schedulers=LRSchedulersContainer(container, lambda step: 1.0),
        states={},
        checkpoint_config=Checkpoint(enable=True, interval=1, last_save_model_only=False),
        sd_adapter=None,
        base_folder=folder,
    )


def save_all(rank: int, world: int, folder: str) -> None:
    for kind in ("AdamMini", "AdamW"):
        manager(kind, f"{folder}/{kind}").save(STEP)


def stale(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def no_key(*_: Any, **__: Any) -> Any:
    raise KeyError("last_epoch")


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def unreadable(path: Path, real: Any = Path.read_bytes) -> bytes:
    if path.name == ".metadata":
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return bytes(real(path))


def elsewhere(path: Any, real: Any = os.path.exists) -> bool:
    return not str(path).endswith("checkpoint") and real(path)


MANAGER = "torchtitan.components.checkpoint.CheckpointManager"
SCHEDULER = "torchtitan.components.lr_scheduler.LRSchedulersContainer"
FAULTS: dict[str, tuple[str, Callable[..., Any], str]] = {
    "unreadable": (
        "pathlib.Path.read_bytes",
        unreadable,
        r"check the checkpoint \S*step-3: PermissionError: .*metadata",
    ),
    "early": (f"{MANAGER}._find_load_step", stale, "look for checkpoints: OSError: .*Stale file handle"),
    "late": (f"{SCHEDULER}.load_state_dict", no_key, "load a checkpoint: KeyError: 'last_epoch'"),
    "settled": ("titan_adam_mini.titan.checkpoint._apply_hyper_parameters", no_key, "load a checkpoint: KeyError"),
    "converted": ("titan_adam_mini.titan.builder.as_expected", no_key, "convert the loaded optimizer state"),
    "collected": (f"{SCHEDULER}.state_dict", no_key, r"collect the state for \S*step-4: KeyError"),
    "full": ("torch.distributed.checkpoint.filesystem._write_item", full, "save step 4: OSError: .*No space left"),
    "purged": (f"{MANAGER}._purge_stale_checkpoints", stale, "save step 4: OSError: .*Stale file handle"),
}
"""name -> what fails on the last rank, how, and the end of the sentence."""


def fail(rank: int, world: int, folder: str, name: str) -> tuple[str, str]:
    place, fault, _ = FAULTS[name]
    saving = name in ("collected", "full", "purged")
    source = name if saving else "AdamW" if name == "converted" else "AdamMini"
    checkpointer = manager("AdamMini", f"{folder}/{source}")
    with mock.patch(place, fault) if rank == world - 1 else mock.patch.dict({}):
        return told(lambda: checkpointer.save(STEP + 1) if saving else checkpointer.load())


def lost(rank: int, world: int, folder: str) -> tuple[str, str]:
    """The last rank does not see the folder of checkpoints."""
    checkpointer = manager("AdamMini", f"{folder}/AdamMini")
    with mock.patch("os.path.exists", elsewhere) if rank == world - 1 else mock.patch.dict({}):
        return told(checkpointer.load)


def kept(rank: int, world: int, folder: str) -> Any:
    """Nothing fails: what is loaded, and whether the ranks are in step afterwards."""
    from titan_adam_mini.titan.all_ranks import gathered

    answers = [manager("AdamMini", f"{folder}/{kind}").load() for kind in ("AdamMini", "AdamW", "nowhere")]
    return gathered(answers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("all_ranks"))
    run(save_all, RANKS, path, timeout=DEADLINE)
    return path


@pytest.mark.parametrize("name", list(FAULTS))
def test_the_checkpointer_fails_on_every_rank_if_it_fails_on_one(folder: str, name: str) -> None:
    answers = run(fail, RANKS, folder, name, timeout=DEADLINE)
    (kind, sentence), other = answers
    assert (kind, sentence) == other and kind == "RuntimeError"
    assert re.match(f"rank 1 could not {FAULTS[name][2]}", sentence), sentence


def test_ranks_that_see_other_checkpoints_are_told(folder: str) -> None:
    answers = run(lost, RANKS, folder, timeout=DEADLINE)
    assert len(set(answers)) == 1 and answers[0][0] == "ValueError"
    assert "rank 0 sees step 3 as the one to load, rank 1 sees no such folder" in answers[0][1]


def test_loading_goes_on_where_nothing_fails(folder: str) -> None:
    assert run(kept, RANKS, folder, timeout=DEADLINE) == [[[True, True, False]] * 2] * 2


# Building, and listening


def built(rank: int, world: int) -> tuple[str, str]:
    from titan_adam_mini.titan import builder

    config = SimpleNamespace(early_step_in_backward=False, implementation="foreach")
    made = {"side_effect": ValueError("there is no wq here")} if rank == 0 else {"return_value": None}
    with mock.patch.object(builder, "optimizer_of", **made), mock.patch.object(builder, "AdamMiniContainer"):
        return told(lambda: builder.build_adam_mini([torch.nn.Linear(1, 1)], config, None))


def listened(rank: int, world: int) -> tuple[str, str]:
    from titan_adam_mini.titan import interruption

    with mock.patch.object(interruption, "Agreement", stale if rank == 1 else mock.Mock()):
        with mock.patch.object(interruption.signal, "signal"):
            heard = interruption.Interruption()
        return told(lambda: heard.begin(0, None))


def test_a_rank_whose_model_part_cannot_be_served_ends_the_others_too() -> None:
    assert run(built, 2, timeout=DEADLINE) == [("ValueError", "rank 0: there is no wq here")] * 2


def test_a_rank_that_cannot_listen_ends_the_others_too() -> None:
    sentence = "rank 1 could not listen for signals on other ranks: OSError: [Errno 116] Stale file handle"
    assert run(listened, 2, timeout=DEADLINE) == [("RuntimeError", sentence)] * 2
