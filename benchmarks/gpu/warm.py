"""Compiles every shipped form for this GPU into Triton's cache, in as many processes as there are cores.

    python -m benchmarks.gpu.warm [--forms NAME ...]

The forms are those of the ahead-of-time tests. On a machine without a GPU they are compiled for sm_90.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import sys

import torch

from tests.ops import test_ortho_proj_loss_aot as aot

MOST_PROCESSES = 12


def compile_one(job: tuple[str, str]) -> tuple[str, str | None]:
    """(the form, why it does not compile)."""
    try:
        aot.compile_form(job)
    except Exception as error:  # of Triton or ptxas, of many kinds: the other forms go on, and the call reports it
        return job[0], f"{type(error).__name__}: {str(error)[:200]}"
    return job[0], None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.warm", description=__doc__.splitlines()[0])
    parser.add_argument("--forms", nargs="*", help="names of forms (default: all)")
    forms = parser.parse_args(arguments).forms or aot.names()
    os.environ.pop("TRITON_INTERPRET", None)
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    jobs = [(form, f"sm_{major}{minor}") for form in forms]
    processes = min(MOST_PROCESSES, os.cpu_count() or 1, len(jobs))
    with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        reasons = {form: reason for form, reason in pool.map(compile_one, jobs) if reason}
    for form, reason in reasons.items():
        print(f"{form}: {reason}")
    print(f"{len(jobs) - len(reasons)} of {len(jobs)} forms compiled")
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
