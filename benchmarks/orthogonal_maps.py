"""The orthogonal map side by side: the closed form against PyTorch's three maps and against its own matrix products.

    python -m benchmarks.orthogonal_maps            3024 x 192, forward + backward, under four minutes on two CPU cores
    python -m benchmarks.orthogonal_maps --t 768 --s 64        in seconds

PyTorch's matrix exponential takes half a minute for one forward and backward at full size, and is timed twice.
"""

import argparse
import sys
from pathlib import Path

from benchmarks import bench_cayley, floors, harness, records, sampling

# How many times slower than vkd_kernels each is expected to be, at least (of its own products: at most 1 / 1.6).
TARGETS = {"torch householder": 250.0, "torch cayley": 80.0, "torch matrix_exp": 2000.0}
MOST_TIMES_OWN_PRODUCTS = 1.6
FULL_SIZE = (3024, 192)
NAMES = ("vkd_kernels", bench_cayley.OWN_PRODUCTS, "closed form, inv_ex", *TARGETS)


def compare(t: int, s: int, seconds: float, folder: Path) -> tuple[dict, Path]:
    """(the measured case, the record's path)."""
    device = records.device_type()
    rates = floors.ceilings(device, bench_cayley.dtypes(device))
    case = bench_cayley.map_case((t, s), device, maps=True)
    case.passes = ("both",)
    case.candidates = [candidate for candidate in case.candidates if candidate.name in NAMES]
    record = records.Record("orthogonal_maps", folder, rates)
    result = harness.measure(case, device, rates, seconds, memory=False, least=2)
    record.add(harness.without_samples(result))
    return result, record.path


def table(case: dict) -> str:
    """The medians, how many times the first one's each is, and the targets, which are about the full size."""
    rows = {row["candidate"]: row for row in case["rows"] if "pass" in row}
    ours = rows["vkd_kernels"]["median_s"]
    lines = [
        f"{'forward + backward, ' + case['case']:40} {'median':>12} {'p10 .. p90':>24} {'times ours':>12}   target"
    ]
    full_size = (case["parameters"]["t"], case["parameters"]["s"]) == FULL_SIZE
    for name, row in rows.items():
        ratio = row["median_s"] / ours
        if name == bench_cayley.OWN_PRODUCTS:
            target, met = f"ours <= {MOST_TIMES_OWN_PRODUCTS} x", 1 / ratio <= MOST_TIMES_OWN_PRODUCTS
            times = f"1 / {1 / ratio:.2f}"
        else:
            target, met = f">= {TARGETS.get(name, 0):g} x", ratio >= TARGETS.get(name, 0)
            times = f"{ratio:.1f}"
        spread = f"{row['p10_s'] * 1e3:.2f} .. {row['p90_s'] * 1e3:.2f} ms"
        verdict = f"{target}: {'met' if met else 'MISSED'}" if full_size and (name in TARGETS or "own" in name) else ""
        lines.append(f"{name:40} {row['median_s'] * 1e3:9.2f} ms {spread:>24} {times:>12}   {verdict}")
    return "\n".join(lines)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orthogonal_maps", description=__doc__.splitlines()[0])
    parser.add_argument("--t", type=int, default=FULL_SIZE[0], help="rows of the weight (default: %(default)s)")
    parser.add_argument("--s", type=int, default=FULL_SIZE[1], help="columns of the weight (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=6.0, help="sampling time of each map (default: %(default)s)")
    parser.add_argument(
        "--records", type=Path, default=records.RUNS, help="folder of the record (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    case, path = compare(options.t, options.s, options.seconds, options.records)
    problems = harness.failures(case)
    for problem in problems:
        print("FAILED", problem)
    if any(row["candidate"] == "vkd_kernels" and "pass" in row for row in case["rows"]):
        print(table(case))
        if (share := case["others_cpu_share"]) is not None:
            print(
                f"other processes took {share:.0%} of the processors' time"
                + (": too much" if share > sampling.MOST_OTHERS_SHARE else "")
            )
    print(f"record: {path}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
