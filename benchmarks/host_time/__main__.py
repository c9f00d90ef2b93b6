"""Host time of forward and backward of the fused loss, on a machine without a GPU.

    python -m benchmarks.host_time              the record: median of 60 calls
    python -m benchmarks.host_time --check      every form once: each launch must be accepted

Python, PyTorch and Triton's own launcher are real; the driver is a stub (stub.c) and library products cost nothing. The
tensors lie on the CPU, whose allocator keeps what is freed, as the CUDA caching allocator does.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import records
from benchmarks.host_time import forms, stub

CALLS = 60
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30), "MALLOC_TOP_PAD_": str(64 << 20)}
ROWS = {
    "token 100352 x 192 -> 3024": (100352, 192, 3024),
    "token 100352 x 384 -> 3024": (100352, 384, 3024),
    "token 100352 x 768 -> 3024": (100352, 768, 3024),
    "pooled 512 x 192 -> 3024": (512, 192, 3024),
}


def times(function: Callable[[], None]) -> dict[str, float]:
    """Median and spread of CALLS calls, in seconds, and the median of the thread's own time (others share the CPU)."""
    for _ in range(10):
        function()
    wall, own = [], []
    for _ in range(CALLS):
        began, own_began = time.perf_counter(), time.thread_time()
        function()
        own.append(time.thread_time() - own_began)
        wall.append(time.perf_counter() - began)
    wall.sort()
    return {
        "median_s": statistics.median(wall),
        "p10_s": wall[CALLS // 10],
        "p90_s": wall[-CALLS // 10],
        "median_own_s": statistics.median(own),
    }


def check(driver: stub.Stub) -> int:
    refused = 0
    for name, both in forms.forms().items():
        before = driver.launches
        try:
            both()
            both()  # by the kernels that were kept
            print(f"{name:40} {driver.launches - before} launches", flush=True)
        except Exception as error:
            refused += 1
            print(f"{name:40} REFUSED {type(error).__name__}: {str(error)[:300]}", flush=True)
    return refused


def measure(driver: stub.Stub, folder: Path) -> None:
    cases = []
    for name, (n, s, t) in ROWS.items():
        both = forms.plain(forms.spec(), n, s, t, weight=torch.bfloat16)
        row = {"candidate": "vkd_kernels", "pass": "both", "samples": CALLS, **times(both)}
        before = driver.launches
        both()
        row |= {"launches": driver.launches - before, "host_s": row["median_s"]}
        cases.append({"case": name, "parameters": {"n": n, "s": s, "t": t}, "dtype": "bfloat16", "rows": [row]})
        print(f"{name:30} {1e6 * row['median_s']:6.0f} µs ({1e6 * row['median_own_s']:.0f} of its own)", flush=True)
    record = {"benchmark": "host_time", "environment": records.environment(), "cases": cases}
    records.write(folder / records.device_folder() / "host_time.json", record)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--records", type=Path, default=records.RUNS)
    arguments = parser.parse_args()
    if stub.why_not():
        raise SystemExit(f"needs gcc and Triton: {stub.why_not()}")
    if not KEEP_MEMORY.items() <= os.environ.items():  # read by malloc when a process starts
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.host_time", *sys.argv[1:]], os.environ | KEEP_MEMORY
        )
    torch.set_num_threads(1)
    driver = stub.Stub()
    stub.without_products()
    if arguments.check:
        return check(driver)
    measure(driver, arguments.records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
