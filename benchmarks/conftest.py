"""pytest-benchmark over the harness: `pytest benchmarks/ --benchmark-only` tabulates what harness.measure has timed.

A case is measured once, its candidates taking turns, when the first of its tests runs. The tests replay those samples
on a clock of their own, so that the table and pytest-benchmark's comparisons are of the very times in the record.
"""

from pathlib import Path

import pytest

from benchmarks import floors, harness, records


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks of vkd_kernels")
    group.addoption("--records", type=Path, default=records.RUNS, help="folder of the records (runs/benchmarks)")
    group.addoption("--seconds", type=float, default=0.3, help="sampling time per candidate and pass")


def pytest_collect_file(file_path, parent):
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)


def pytest_generate_tests(metafunc):
    if "measured" in metafunc.fixturenames:
        rows = [
            (case, candidate, which)
            for case in metafunc.module.cases(records.device_type())
            for candidate in case.candidates
            for which in case.passes
            if which in candidate.passes
        ]
        names = [f"{case.name}-{candidate.name}-{which}" for case, candidate, which in rows]
        metafunc.parametrize("case, candidate, which", rows, ids=names)


class ReplayClock:
    """A timer that shows, around the n-th call, the n-th sample."""

    def __init__(self):
        self.now = 0.0
        self.samples = iter(())

    def __call__(self) -> float:
        return self.now

    def step(self) -> None:
        self.now += next(self.samples, 0.0)


CLOCK = ReplayClock()


def pytest_collection_modifyitems(items):
    for item in items:
        if "measured" in getattr(item, "fixturenames", ()):
            params = item.callspec.params
            group = f"{item.module.__name__.rpartition('.')[2]}: {params['case'].name}, {params['which']}"
            item.add_marker(pytest.mark.benchmark(group=group, timer=CLOCK))


@pytest.fixture(scope="module")
def run(request):
    """{case name: result} of this module's cases so far, with the record that they go to."""
    device = records.device_type()
    rates = floors.ceilings(device, request.module.dtypes(device))
    name = request.module.__name__.rpartition(".")[2].removeprefix("bench_")
    return {}, records.Record(name, request.config.getoption("--records"), rates), device, rates


@pytest.fixture
def measured(run, benchmark, request):
    """measured(case, candidate, which): measures the case unless it has been, and hands the samples to the table."""
    results, record, device, rates = run

    def replay(case, candidate, which):
        if case.name not in results:
            results[case.name] = harness.measure(case, device, rates, request.config.getoption("--seconds"))
            record.add(harness.without_samples(results[case.name]))
        rows = [row for row in results[case.name]["rows"] if row["candidate"] == candidate.name]
        row = next((row for row in rows if row.get("pass") == which), rows[0])
        if "skipped" in row:
            pytest.skip(row["skipped"])
        assert "raw" in row, row.get("wrong") or row.get("failed")
        benchmark.extra_info.update({k: v for k, v in row.items() if k not in ("raw", "candidate", "pass")})
        CLOCK.samples = iter(row["raw"])
        benchmark.pedantic(CLOCK.step, rounds=len(row["raw"]))

    return replay
