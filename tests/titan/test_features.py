"""What the import and every feature change in torchtitan: exactly what docs/torchtitan.md says, and nothing else."""

import re
import sys
from collections.abc import Iterator
from importlib import import_module, metadata, reload
from pathlib import Path

import pytest
from changes import changes
from ranks import forkserver

from titan_adam_mini.titan import device, features, interruption, private, register, replaced

PAGE = Path(__file__).resolve().parents[2] / "docs" / "torchtitan.md"
DEVICE = re.compile(r"torchtitan\..*:device_(module|type)")


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    ours, theirs = forkserver().Pipe()
    process = forkserver().Process(target=changes, args=(theirs,), daemon=True)
    process.start()
    try:
        assert ours.poll(120), "torchtitan could not be imported in time"
        answer: dict[str, list[str]] = ours.recv()
    finally:
        process.kill()
        process.join()
    return answer


def documented() -> Iterator[tuple[str, list[str]]]:
    """The table of the page: what switches it on -> the names it replaces."""
    for row in re.findall(r"^\| (.+) \|$", PAGE.read_text(), re.MULTILINE):
        cells = [cell.strip() for cell in row.split(" | ")]
        if len(cells) == 4 and "torch" in cells[2]:
            yield cells[0], re.findall(r"`([\w.]+:[\w.]+)`", cells[2])


def test_the_page_says_what_is_replaced(found: dict[str, list[str]]) -> None:
    table = dict(documented())
    assert set(table) == {"the import", "`log_memory = true`", *(f"`{one}`" for one in features.FEATURES)}
    for name, cell in (("import", "the import"), ("log_memory", "`log_memory = true`")):
        assert found[name] == sorted(table[cell])
    for name in features.FEATURES:
        names = found[name]
        if name == "cpu":
            assert any(DEVICE.fullmatch(one) for one in names)
            names = [one for one in names if not DEVICE.fullmatch(one)]
        assert names == sorted(table[f"`{name}`"]), name


def test_doing_it_again_changes_nothing(found: dict[str, list[str]]) -> None:
    assert [found[name] for name in found if name.endswith("again")] == [[]] * (1 + len(features.FEATURES))


@pytest.mark.parametrize("name", list(features.FEATURES))
def test_each_feature_has_a_variable_that_is_checked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in features.FEATURES:
        monkeypatch.delenv(features.Feature.variable(one), raising=False)
    variable = f"TITAN_ADAM_MINI_{name.upper()}"
    assert f"`{variable}=1`" in PAGE.read_text()
    for value, want in (("", []), ("0", []), ("1", [name])):
        monkeypatch.setenv(variable, value)
        assert features.from_environment() == want
    monkeypatch.setenv(variable, "yes")
    with pytest.raises(ValueError, match=f"{variable} = 'yes' is not valid: set it to 1 for "):
        register.enable()


def test_an_unknown_feature_is_refused_before_anything_is_installed() -> None:
    with pytest.raises(ValueError, match=r"titan_adam_mini.titan has no feature 'gpu': valid names are cpu, signals"):
        register.enable("one_curve", "gpu")


def test_variables_of_a_feature_that_is_off_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(features, "_installed", set())
    monkeypatch.setenv(interruption.VARIABLES[1], "20")
    register._warn_of_unused_variables()
    assert caplog.messages == [
        "Without TITAN_ADAM_MINI_SIGNALS=1 these variables have no effect: TITAN_ADAM_MINI_HANG_SECONDS."
    ]
    monkeypatch.setattr(features, "_installed", {"signals"})
    register._warn_of_unused_variables()
    assert len(caplog.messages) == 1


# Versions


@pytest.mark.parametrize("version", ["0.2.1", "0.1", "0.3.0", "0.3.0.dev20260901+cu130", "1.0"])
def test_another_torchtitan_is_refused_at_once(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    sentence = f"torchtitan {version} is installed, but titan_adam_mini.titan supports 0.2.2 or later, before 0.3"
    with pytest.raises(ImportError, match=re.escape(sentence)):
        reload(sys.modules["titan_adam_mini.titan"])


@pytest.mark.parametrize("version", ["0.2.2", "0.2.10", "0.2.3.dev1+cpu"])
def test_these_are_not(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    private.check_version()


def test_a_checkout_without_a_version_is_judged_by_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", unknown)
    private.check_version()
    with pytest.raises(ImportError, match=r"torchtitan\.models has no farewell: torchtitan of unknown version is"):
        replaced.replace(import_module("torchtitan.models"), "farewell", lambda original: None)


# A machine without an accelerator


@pytest.mark.parametrize(("accelerator", "installed", "lines"), [(False, False, 1), (False, True, 0), (True, False, 0)])
def test_without_an_accelerator_the_import_names_the_variable(
    accelerator: bool, installed: bool, lines: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("TITAN_ADAM_MINI_CPU", raising=False)
    monkeypatch.setattr(device, "has_accelerator", lambda: accelerator)
    monkeypatch.setattr(features, "_installed", {"cpu"} if installed else set())
    with caplog.at_level("INFO"):
        reload(sys.modules["titan_adam_mini.titan"])
    assert sum("TITAN_ADAM_MINI_CPU=1" in message for message in caplog.messages) == lines
