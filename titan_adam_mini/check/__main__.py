"""One stage, in the process that the runner starts for it: `python -m titan_adam_mini.check STAGE --device ...`."""

import argparse
import importlib
import signal
import sys
import time
import traceback
from pathlib import Path

from .stage import Context, Result, Skip


def main() -> int:
    """Run one stage and write its result; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--ngpu", type=int, required=True)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    options = vars(parser.parse_args())
    name = options.pop("stage")
    for number in (signal.SIGTERM, signal.SIGHUP):  # like an interrupt: unwinding ends the processes of the stage
        signal.signal(number, lambda received, frame: sys.exit(128 + received))
    context = Context(**options, started=time.monotonic())
    try:
        result = importlib.import_module(f".stages.{name}", __package__).run(context)
    except Skip as reason:
        result = Result(True, str(reason), skipped=True)
    except Exception as error:
        traceback.print_exc()
        message = " | ".join(line.strip() for line in str(error).strip().splitlines()[:4])
        result = Result(False, f"{type(error).__name__}: {message}"[:300])
    result.write(context.result)
    print(result.line, flush=True)
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
