"""Two calls that measure and test on a machine with an NVIDIA GPU, in order of value.

    python -m benchmarks.gpu --call 1 --records $OUT      at most 6 minutes: is it right, then a row per claim
    python -m benchmarks.gpu --call 2 --records $OUT      at most 5 minutes: profile, tiles, sanitizers, the other rows

Each step writes its result before the next begins, and everything is packed into a few files: call<N>.json (how every
step went, with the end of its output), call<N>.log (all output) and call<N>-records.tgz (the records, for
benchmarks/results). A step that fails or runs late loses nothing. The tree needs no .git: VKD_COMMIT names the commit.
Nothing is installed but the extension, built in place. --rehearse runs every step on a CPU with tiny shapes, through
Triton's interpreter; --list prints the plan. Exit status: 0 all passed, 1 some did not, 2 no GPU.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import records
from benchmarks.gpu import plan, runner


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--call", type=int, choices=(1, 2), help="one of the two calls (default: both)")
    parser.add_argument("--records", type=Path, default=records.RUNS, help="folder of the results (%(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="every step on a CPU, tiny, interpreted")
    parser.add_argument("--list", action="store_true", help="print the plan and stop")
    options = parser.parse_args(arguments)
    calls = (options.call,) if options.call else (1, 2)
    if options.list:
        for call in calls:
            print(plan.described(plan.groups(call, options.records, rehearse=False), call))
        return 0
    if not (options.rehearse or torch.cuda.is_available()):
        print("no NVIDIA GPU: torch.cuda.is_available() is False. --list prints the plan.", file=sys.stderr)
        return 2
    passed = [runner.run_call(call, options.records.resolve(), options.rehearse) for call in calls]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
