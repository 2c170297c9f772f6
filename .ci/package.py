"""Builds the sdist and, from it, the wheel; installs the wheel into a bare environment; tries it there.

The environment has nothing but the wheel's own base dependencies, which are linked out of this Python's environment:
what is imported and not declared fails. torch comes last, so that what must work without it is tried without it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "titan_adam_mini"
COMMANDS = ("plan", "estimate", "snapshot", "convert", "inspect", "bench", "compare", "check")
EXTRA = "pip install 'titan-adam-mini[titan]'"

STEP = """
import torch
from titan_adam_mini import AdamMini

model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
optimizer = AdamMini({"tok_embeddings.weight": model[0].weight, "output.weight": model[1].weight}.items(), n_heads=2)
model(torch.arange(8)).sum().backward()
before = model[1].weight.detach().clone()
optimizer.step()
assert not torch.equal(before, model[1].weight)
"""

TYPED = """
from titan_adam_mini import AdamMini, Partition
AdamMini([], n_heads="two")
Partition.transformer(n_heads="two")
import titan_adam_mini
titan_adam_mini.AdamMaxi
"""


def run(*command: str | Path, cwd: Path, status: int = 0) -> str:
    """The output of a command; ends this process if its exit status is another one."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    seen = done.stdout + done.stderr
    if done.returncode != status:
        sys.exit(f"{' '.join(map(str, command))}: status {done.returncode}, not {status}\n{seen}")
    return seen


def check(right: bool, wrong: str) -> None:
    if not right:
        sys.exit(wrong)


def build(folder: Path) -> tuple[Path, Path]:
    """Sdist and wheel of the files that git knows, or would know."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    files = [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    for name in files:
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source", cwd=folder)
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")

    wanted = {name for name in files if name.startswith(f"{PACKAGE}/")}
    with ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    check(f"{PACKAGE}/py.typed" in held, f"{wheel.name} has no {PACKAGE}/py.typed")
    check(held == wanted, f"{wheel.name} has other files than {PACKAGE}/: {sorted(held ^ wanted)}")
    with tarfile.open(sdist) as archive_:
        names = {name.partition("/")[2] for name in archive_.getnames()}
    missing = (wanted | {"pyproject.toml", "README.md", "LICENSE"}) - names
    check(not missing, f"{sdist.name} lacks {sorted(missing)}")
    return sdist, wheel


def needed(names: list[str], without: str = "") -> set[str]:
    """What these distributions need, extras left out, as far as it is installed here."""
    found: set[str] = set()
    while names:
        name = re.split(r"[^\w.-]", names.pop(), maxsplit=1)[0]
        try:
            more = requires(name) or []
        except PackageNotFoundError:  # for another Python or another system
            continue
        if name not in found and name != without:
            found.add(name)
            names += [one for one in more if "extra ==" not in one]
    return found


def link(names: set[str], site: Path) -> None:
    """Make distributions of this environment importable in another one."""
    for name in names:
        one = distribution(name)
        for top in {file.parts[0] for file in one.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(one.locate_file(top))).resolve())


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="package-") as made:
        folder = Path(made)
        _, wheel = build(folder)
        bare = folder / "bare"
        python, command = bare / "bin" / "python", bare / "bin" / "titan-adam-mini"
        run(sys.executable, "-m", "venv", "--without-pip", bare, cwd=folder)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
        run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
        asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = Path(run(python, "-c", asked, cwd=folder).strip())
        metadata = next(site.glob("titan_adam_mini-*.dist-info")) / "METADATA"
        lines = [line.partition("Requires-Dist: ") for line in metadata.read_text().splitlines()]
        base = [one for _, key, one in lines if key and "extra ==" not in one]

        link(needed(base, without="torch"), site)
        run(python, "-c", f"import {PACKAGE}", cwd=folder)
        check("compare" in run(command, "--help", cwd=folder), "titan-adam-mini --help does not list the commands")
        for name in COMMANDS:
            run(command, name, "--help", cwd=folder)
        run(command, "plan", "--no-such-flag", cwd=folder, status=2)
        (folder / "typed.py").write_text(TYPED)
        mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "--cache-dir", "mypy"]
        seen = run(*mypy, "typed.py", cwd=folder, status=1)
        wrong = re.findall(r"typed.py:\d+: error: .*\[(.+)\]", seen)
        check(wrong == ["arg-type", "arg-type", "attr-defined"], f"the package's types are not seen outside:\n{seen}")

        link(needed(["torch"]), site)
        run(python, "-c", STEP, cwd=folder)
        config = folder / "source" / "train_configs" / "debug_model.toml"
        seen = run(command, "plan", config, "--ngpu", "2", cwd=folder, status=1)
        check(EXTRA in seen, f"plan without torchtitan does not name the extra:\n{seen}")
    print("Built, installed into a bare environment, and tried there.")


if __name__ == "__main__":
    main()
