"""Records -> README.md and plots beside them: `python -m benchmarks.report [folder]` (default: benchmarks/results).

Targets that need an NVIDIA GPU are marked as not measured until a record from one is there.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import orthogonal_maps, records, sampling
from benchmarks.bench_cayley import OWN_PRODUCTS

Records = dict[str, dict]  # {benchmark: record} of one device
MAPS, LOSS, CAYLEY, STEP = "orthogonal_maps", "ortho_proj_loss", "cayley", "training_step"
SEMI_ORTHOGONAL = "semi_orthogonal"
WITHOUT_SHARES = (STEP, "feature_store")  # their floor counts the teacher, which not every candidate runs
NOT_MEASURED = "not measured yet: it needs an NVIDIA GPU (`make gpu`)"

# -------------------------------------------------------------------------------------------------------- looking up


def row_of(device: Records, benchmark: str, case: str, candidate: str, which: str = "both") -> dict | None:
    for measured in device.get(benchmark, {}).get("cases", []):
        if measured["case"] == case:
            return next((r for r in measured["rows"] if r["candidate"] == candidate and r.get("pass") == which), None)
    return None


def value(benchmark: str, case: str, candidate: str, key: str) -> Callable[[Records], float | None]:
    return lambda device: (row_of(device, benchmark, case, candidate) or {}).get(key)


def ratio(benchmark: str, case: str, slow: str, fast: str = "vkd_kernels") -> Callable[[Records], float | None]:
    """How many times `fast` goes into `slow`, forward and backward together, in one run."""

    def measure(device):
        rows = [row_of(device, benchmark, case, name) for name in (slow, fast)]
        return rows[0]["median_s"] / rows[1]["median_s"] if all(rows) else None

    return measure


def ratio_to_fastest(benchmark: str, case: str, others: list[str]) -> Callable[[Records], float | None]:
    """How many times vkd_kernels goes into the fastest of the others."""
    ratios = [ratio(benchmark, case, name) for name in others]
    return lambda device: min((times for r in ratios if (times := r(device)) is not None), default=None)


def share_of(benchmark: str, case: str, other: str, key: str) -> Callable[[Records], float | None]:
    """What vkd_kernels takes, as a share of what another candidate takes in one run."""

    def measure(device):
        rows = [row_of(device, benchmark, case, name) for name in ("vkd_kernels", other)]
        return rows[0][key] / rows[1][key] if all(rows) else None

    return measure


def added(case: str, candidate: str = "vkd_kernels") -> Callable[[Records], float | None]:
    """What the feature loss adds to a training step, as a share of the step without it."""
    times = ratio(STEP, case, candidate, "no feature loss")
    return lambda device: None if (measured := times(device)) is None else measured - 1


# ------------------------------------------------------------------------------------------------------------ targets


@dataclass
class Target:
    what: str
    measure: Callable[[Records], float | None]
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "x"
    scale: float = 1.0  # of the measured value, for showing it in `unit`

    def shown(self, device: Records | None) -> tuple[str, str]:
        """(the measured figure, whether the target is met)."""
        measured = None if device is None else self.measure(device)
        if measured is None:
            return "—", "not in the record" if device else NOT_MEASURED
        measured *= self.scale
        met = measured >= self.at_least if self.at_least is not None else measured <= self.at_most
        return f"{measured:.4g} {self.unit}", "yes" if met else "**no**"

    @property
    def limit(self) -> str:
        return f"≥ {self.at_least:g} {self.unit}" if self.at_least is not None else f"≤ {self.at_most:g} {self.unit}"


CPU_TOKEN = "token 16384 x 192 -> 3024 float32"
CPU_TARGETS = [
    *(
        Target(f"orthogonal map 3024 x 192: faster than {name}", ratio(MAPS, "3024 x 192", name), at_least=times)
        for name, times in orthogonal_maps.TARGETS.items()
    ),
    Target(
        "orthogonal map 3024 x 192: time over that of its own float32 products",
        ratio(MAPS, "3024 x 192", "vkd_kernels", OWN_PRODUCTS),
        at_most=orthogonal_maps.MOST_TIMES_OWN_PRODUCTS,
    ),
    Target(
        "six 256 x 256 in one call: faster than six calls",
        ratio(CAYLEY, "6 x 256 x 256", "vkd_kernels, one call a matrix"),
        at_least=1.0,
    ),
    Target(f"{CPU_TOKEN}: faster than eager", ratio(LOSS, CPU_TOKEN, "eager"), at_least=1.0),
    Target(
        f"{CPU_TOKEN}: memory beyond inputs and gradients",
        value(LOSS, CPU_TOKEN, "vkd_kernels", "peak_bytes_beyond_gradients"),
        at_most=128,
        unit="MiB",
        scale=2**-20,
    ),
    *(
        target
        for case in (f"{loss} 16384 x 192 -> 3024 float32" for loss in ("cosine", "mse"))
        for target in (
            Target(
                f"semi-orthogonal, {case}: time of eager's",
                share_of(SEMI_ORTHOGONAL, case, "eager", "median_s"),
                at_most=0.75,
            ),
            Target(
                f"semi-orthogonal, {case}: extra memory of eager's",
                share_of(SEMI_ORTHOGONAL, case, "eager", "peak_bytes_beyond_gradients"),
                at_most=0.1,
            ),
        )
    ),
]
POOLED = "pooled 512 x 192 -> 3024 bfloat16"
GRAPH = "vkd_kernels, CUDA graph"
DEIT_STEP = "pooled deit_tiny_patch16_224 from regnety_160, 512 images"


@dataclass
class TokenTarget:
    """Of the token-level loss, N = 100352, T = 3024, bfloat16, for one S; shares of the floor in per cent."""

    s: int
    share_first: float  # of the schedule as it was modelled before any GPU ran it
    share_tuned: float  # of tuned Triton
    times_eager: float
    times_compile: float
    memory_mib: float

    def targets(self) -> list[Target]:
        case = f"token 100352 x {self.s} -> 3024 bfloat16"
        share = value(LOSS, case, "vkd_kernels", "share_of_floor")
        memory = value(LOSS, case, "vkd_kernels", "peak_bytes_beyond_gradients")
        return [
            Target(f"{case}: share of the floor", share, at_least=self.share_first, unit="%", scale=100),
            Target(f"{case}: share of the floor, tuned", share, at_least=self.share_tuned, unit="%", scale=100),
            Target(f"{case}: faster than eager", ratio(LOSS, case, "eager"), at_least=self.times_eager),
            Target(
                f"{case}: faster than torch.compile", ratio(LOSS, case, "torch.compile"), at_least=self.times_compile
            ),
            Target(f"{case}: extra memory", memory, at_most=self.memory_mib, unit="MiB", scale=2**-20),
        ]


TOKEN_TARGETS = [
    TokenTarget(s=192, share_first=36, share_tuned=45, times_eager=5, times_compile=2, memory_mib=128),
    TokenTarget(s=384, share_first=49, share_tuned=55, times_eager=4, times_compile=1.6, memory_mib=128),
    TokenTarget(s=768, share_first=56, share_tuned=62, times_eager=2.5, times_compile=1.2, memory_mib=160),
]


def graph_time(case: str, at_most: float) -> Target:
    return Target(
        f"Cayley {case}: graph time", value(CAYLEY, case, GRAPH, "median_s"), at_most=at_most, unit="µs", scale=1e6
    )


GPU_TARGETS = [
    *(target for of_size in TOKEN_TARGETS for target in of_size.targets()),
    Target(
        f"{POOLED}: launches under graph capture", value(LOSS, POOLED, GRAPH, "launches"), at_most=3, unit="launches"
    ),
    Target(
        f"{POOLED}: faster than eager, both as CUDA graphs", ratio(LOSS, POOLED, "eager, CUDA graph", GRAPH), at_least=3
    ),
    Target(f"training step, {DEIT_STEP}: added by the loss", added(DEIT_STEP), at_most=2, unit="%", scale=100),
    graph_time("3024 x 192", 200),
    graph_time("3024 x 192", 150),
    graph_time("6 x 256 x 256", 200),
    *(
        Target(
            f"Cayley {case}: faster than the closed form on torch.linalg",
            ratio_to_fastest(CAYLEY, case, [f"closed form, {how}" for how in ("inv_ex", "solve_ex", "lu")]),
            at_least=5,
        )
        for case in ("3024 x 192", "6 x 256 x 256")
    ),
    *(
        Target(f"Cayley 3024 x 192: faster than {name}", ratio(CAYLEY, "maps 3024 x 192", name), at_least=50)
        for name in orthogonal_maps.TARGETS
    ),
]


# ----------------------------------------------------------------------------------------------------------- markdown


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)] + [""]


def targets_table(targets: list[Target], device: Records | None) -> list[str]:
    rows = [[target.what, target.limit, *target.shown(device)] for target in targets]
    return table(["forward + backward", "target", "measured", "met"], rows)


def _milliseconds(row: dict | None) -> str:
    if row is None:
        return ""
    return f"{row['median_s'] * 1e3:.3f} ({row['p10_s'] * 1e3:.3f} to {row['p90_s'] * 1e3:.3f})"


def case_rows(case: dict, with_shares: bool = True) -> list[list[str]]:
    result = []
    for name in dict.fromkeys(row["candidate"] for row in case["rows"]):
        rows = {row.get("pass"): row for row in case["rows"] if row["candidate"] == name}
        reason = next(
            (f"{k}: {rows[None][k]}" for k in ("skipped", "wrong", "failed") if k in rows.get(None, {})), None
        )
        both = rows.get("both", {})
        peak, launched, host = (both.get(key) for key in ("peak_bytes_beyond_gradients", "launches", "host_s"))
        result.append(
            [
                case["case"] if not result else "",
                name,
                *(
                    (reason, "", "")
                    if reason
                    else (_milliseconds(rows.get(w)) for w in ("forward", "backward", "both"))
                ),
                f"{both['share_of_floor']:.0%}" if with_shares and "share_of_floor" in both else "",
                "" if peak is None else f"{peak / 2**20:.1f}",
                "" if launched is None else f"{launched:g}",
                "" if host is None else f"{host * 1e6:.0f}",
            ]
        )
    return result


CASE_HEADER = [
    "case",
    "candidate",
    "forward, ms",
    "backward, ms",
    "both, ms",
    "of the floor",
    "extra memory, MiB",
    "launches",
    "host, µs",
]


def environment_lines(record: dict) -> list[str]:
    facts, rates = record["environment"], record.get("ceilings", {})
    versions = ", ".join(f"{k} {facts[k]}" for k in ("torch", "cuda", "triton", "driver", "python") if facts.get(k))
    state = {True: " with uncommitted changes", False: "", None: ", by the caller's word (no checkout)"}[facts["dirty"]]
    commit = (facts["commit"] or "unknown")[:12] + state
    lines = [f"{facts['device']}, {facts['cores']} cores, {facts['threads']} threads; {versions}; commit {commit}."]
    if rates:
        matmul = ", ".join(f"{rate / 1e12:.3g} TFLOP/s {dtype}" for dtype, rate in rates["matmul_flops_per_s"].items())
        lines.append(
            f"Ceilings of this run: copy {rates['copy_bytes_per_s'] / 1e9:.4g} GB/s, matrix products {matmul}."
        )
    if reason := (facts["extension"] or {}).get("missing"):
        lines.append(f"**Without the compiled extension**, so that PyTorch stands in for it: {reason}.")
    if asked := facts.get("requested"):
        lines.append(f"**VKD_KERNELS_BACKEND={asked}** chose the implementations.")
    if shares := others_shares(record):
        note = " **The machine was busy: these figures say little.**" if is_of_busy_machine(record) else ""
        lines.append(f"Other processes took at most {max(shares):.0%} of the processors' time.{note}")
    return [" ".join(lines), ""]


def others_shares(record: dict) -> list[float]:
    return [case["others_cpu_share"] for case in record.get("cases", []) if case.get("others_cpu_share") is not None]


def is_of_busy_machine(record: dict) -> bool:
    return max(others_shares(record), default=0.0) > sampling.MOST_OTHERS_SHARE


def busy_lines(device: Records) -> list[str]:
    """Below the targets: which of the records that they rest on say little."""
    busy = [benchmark for benchmark, record in device.items() if is_of_busy_machine(record)]
    return [f"Measured on a busy machine, so the figures say little: {', '.join(busy)}.", ""] if busy else []


def added_lines(device: Records) -> list[str]:
    """What the feature loss adds to each case's training step."""
    lines = []
    for case in device[STEP]["cases"]:
        shares = {name: added(case["case"], name)(device) for name in ("vkd_kernels", "composition")}
        additions = ", ".join(f"{name} {share:+.1%}" for name, share in shares.items() if share is not None)
        lines.append(f"Added by the feature loss, {case['case']}: {additions or 'not in the record'}.")
    return [*lines, ""]


def steps_table(record: dict) -> list[str]:
    rows = [
        [s["name"], s["outcome"], f"{s['seconds']:.0f} of {s['limit_s']} s", s["summary"].replace("|", "/")]
        for s in record["steps"]
    ]
    return table(["step", "outcome", "time", "summary"], rows)


def markdown(devices: dict[str, Records], plots: dict[str, list[str]]) -> str:
    lines = [
        "# Benchmark records",
        "",
        "Written by `python -m benchmarks.report` from the JSON files beside it. Times are medians with the 10th and "
        "90th percentile; candidates of a case took turns in one run. The floor is the larger of flops over the "
        "measured matmul rate and bytes over the measured copy bandwidth; its share is of forward and backward "
        "together, and left out where some candidates do less than it counts. Extra memory is PyTorch's allocator's, "
        "beyond inputs and gradients (of whole training steps: beyond inputs alone). Host is the time to start both "
        "passes on a GPU.",
        "",
    ]
    for name, device in sorted(devices.items()):
        lines += [f"## {name}", "", *targets_table(CPU_TARGETS if name == "cpu" else GPU_TARGETS, device)]
        lines += busy_lines(device)
        lines += [line for plot in plots.get(name, ()) for line in (f"![{Path(plot).stem}]({plot})", "")]
        for benchmark, record in device.items():
            lines += [f"### {name}: {benchmark}", "", *environment_lines(record)]
            if "cases" in record:
                with_shares = benchmark not in WITHOUT_SHARES
                lines += table(CASE_HEADER, [row for case in record["cases"] for row in case_rows(case, with_shares)])
            elif isinstance(record.get("steps"), list):
                lines += steps_table(record)
            else:
                lines += [f"No table is made of this record: [{benchmark}.json]({name}/{benchmark}.json).", ""]
            if benchmark == STEP:
                lines += added_lines(device)
    if set(devices) <= {"cpu"}:
        lines += ["## GPU", "", *targets_table(GPU_TARGETS, None)]
    return "\n".join(lines).rstrip() + "\n"


# -------------------------------------------------------------------------------------------------------------- plots


def _timed(record: dict, plotted: Callable[[dict], bool]):
    """(case, {candidate: its row of forward + backward}) of the cases that are plotted."""
    for case in record["cases"] if record else ():
        rows = {row["candidate"]: row for row in case["rows"] if row.get("pass") == "both"}
        if plotted(case) and rows:
            yield case, rows


def _share_of_floor(axes, device: Records) -> bool:
    pairs = [
        (f"{benchmark}: {case['case']}", rows)
        for benchmark in (LOSS, CAYLEY)
        for case, rows in _timed(device.get(benchmark), lambda case: not case["plot"])
    ]
    for index, candidate in enumerate(("vkd_kernels", "torch.compile", "eager", "closed form, inv_ex")):
        points = [
            (y, 100 * rows[candidate]["share_of_floor"]) for y, (_, rows) in enumerate(pairs) if candidate in rows
        ]
        if points:
            y, share = zip(*points, strict=True)
            axes.barh([v + 0.2 * (index - 1) for v in y], share, height=0.2, label=candidate)
    axes.set_yticks(range(len(pairs)), [name for name, _ in pairs], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("share of the floor, forward + backward, %")
    return bool(pairs)


def _time_against_n(axes, device: Records) -> bool:
    series = {}
    for case, rows in _timed(device.get(LOSS), lambda case: case["parameters"]["kind"] in ("pooled", "token")):
        size = case["parameters"]
        for candidate, row in rows.items():
            if (
                "graph" not in candidate
                and (size["s"], size["t"]) == (192, 3024)
                and case["dtype"] == case_dtype(device)
            ):
                series.setdefault(candidate, []).append((size["n"], row["median_s"] * 1e3))
    for candidate, points in series.items():
        axes.loglog(*zip(*sorted(points), strict=True), "o-", label=candidate)
    axes.set_xlabel("rows N (192 -> 3024 channels)")
    axes.set_ylabel("forward + backward, ms")
    return bool(series)


def case_dtype(device: Records) -> str:
    """The dtype of most cases: a GPU's record has a few float32 ones beside its 16-bit ones."""
    seen = [case["dtype"] for case in device[LOSS]["cases"]]
    return max(set(seen), key=seen.count)


def _cayley_scaling(variable: str):
    def draw(axes, device: Records) -> bool:
        series, fixed = {}, {}
        for case, rows in _timed(device.get(CAYLEY), lambda case: case["plot"].get("scaling") == variable):
            fixed = case["parameters"]
            for candidate, row in rows.items():
                series.setdefault(candidate, {})[fixed[variable]] = row["median_s"] * 1e3
        for candidate, points in series.items():
            sizes = sorted(points)
            axes.loglog(sizes, [points[size] for size in sizes], "o-", label=candidate)
            axes.set_xticks(sizes, map(str, sizes))
        axes.minorticks_off()
        axes.set_xlabel(f"{variable}  ({', '.join(f'{k} = {v}' for k, v in fixed.items() if k != variable)})")
        axes.set_ylabel("forward + backward, ms")
        return bool(series)

    return draw


FIGURES = {
    "share_of_floor": [_share_of_floor],
    "time_against_n": [_time_against_n],
    "cayley_scaling": [_cayley_scaling(variable) for variable in ("s", "t", "batch")],
}


def plot(folder: Path, name: str, device: Records) -> list[str]:
    """Draws the figures that the device's records have data for; returns their paths relative to the folder."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    written = []
    for title, drawings in FIGURES.items():
        figure, axes = plt.subplots(1, len(drawings), figsize=(5 * len(drawings) + 3, 4.5), squeeze=False)
        # Every drawing is made, also after one without data.
        if any([draw(one, device) for draw, one in zip(drawings, axes[0], strict=True)]):
            for one in axes[0]:
                one.grid(alpha=0.3)
                if one.get_legend_handles_labels()[0]:
                    one.legend(fontsize=7)
            figure.suptitle(f"{title.replace('_', ' ')}, {name}")
            figure.tight_layout()
            path = Path(name) / f"{title}.png"
            figure.savefig(folder / path, dpi=110)
            written.append(path.as_posix())
        plt.close(figure)
    return written


def write(folder: Path) -> Path:
    devices = records.read(folder)
    if not devices:
        raise SystemExit(f"no records in {folder}: expected <device>/<benchmark>.json")
    try:
        plots = {name: plot(folder, name, device) for name, device in devices.items()}
    except ImportError as error:
        print(f"no plots: {error}", file=sys.stderr)
        plots = {}
    path = folder / "README.md"
    path.write_text(markdown(devices, plots))
    return path


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=records.RESULTS)
    print(write(parser.parse_args(arguments).folder))


if __name__ == "__main__":
    main()
