"""Three calls that measure and test on a machine with an NVIDIA GPU, in order of value.

    python -m benchmarks.gpu --call 1 --records $OUT      at most 350 s: is it right, and a row for most claims
    python -m benchmarks.gpu --call 2 --records $OUT      at most 290 s: a training step, rows for the other claims
    python -m benchmarks.gpu --call 3 --records $OUT      at most 340 s: tiles, sanitizers, a profile, rows of no claim

Without --call (`make gpu`) all of them run, which takes up to 980 s: where a command may take less, make one call each.

Each step writes its result before the next begins, and everything goes into a folder of the commit, $OUT/<commit>:
call<N>.json (how every step went, with the end of its output), call<N>.log (all output), records/<device>/*.json and
call<N>-records.tgz, which packs them. A step that fails or runs late loses nothing. A call that is repeated replaces
its call<N>.json and the cases that it measures again; it is refused where another machine or version wrote the records.

To publish, unpack the archives of the calls and merge what they hold, case by case, then write the page:

    python -m benchmarks.records call1-records call2-records --into benchmarks/results
    python -m benchmarks.report

The tree needs no .git: VKD_COMMIT names the commit. Nothing is installed but the extension, built in place. --rehearse
runs every step on a CPU with tiny shapes, through Triton's interpreter; --list prints the plan. Exit status: 0 all
passed, 1 some did not, 2 no GPU or no commit.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import records
from benchmarks.gpu import plan, runner


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--call", type=int, choices=plan.LIMIT_S, help="one of the calls (default: all)")
    parser.add_argument(
        "--records",
        type=Path,
        default=records.RUNS.parent / "gpu",
        help="folder of the results (%(default)s)",
    )
    parser.add_argument("--rehearse", action="store_true", help="every step on a CPU, tiny, interpreted")
    parser.add_argument("--list", action="store_true", help="print the plan and stop")
    options = parser.parse_args(arguments)
    calls = [options.call] if options.call else list(plan.LIMIT_S)
    if options.list:
        for call in calls:
            print(plan.described(plan.groups(call, options.records, rehearse=False), call))
        return 0
    if not (options.rehearse or torch.cuda.is_available()):
        print("no NVIDIA GPU: torch.cuda.is_available() is False. --list prints the plan.", file=sys.stderr)
        return 2
    if not (options.rehearse or records.commit()):
        print("no commit: this tree has no .git; name its commit as VKD_COMMIT=<40 hex digits>", file=sys.stderr)
        return 2
    passed = [runner.run_call(call, options.records.resolve(), options.rehearse) for call in calls]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
