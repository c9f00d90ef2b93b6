"""Runs the tests under the oldest PyTorch and Triton that are supported, and records the result: `make test-lowest`.

The record says which versions and which commit it is of, how many tests passed, and the reasons of those that were
skipped. From a changed tree the tests run all the same, and no record is written.
"""

import subprocess
import sys
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import records

RECORD = records.RESULTS / "lowest_versions.json"
REPORT = records.RUNS / "lowest_versions.xml"


def outcome(report: Path) -> dict:
    """Counts from pytest's JUnit report, and how many tests were skipped for which reason."""
    cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    reasons = [skip.get("message", "") for case in cases if (skip := case.find("skipped")) is not None]
    return {
        "passed": len(cases) - len(failed) - len(reasons),
        "failed": sorted(f"{case.get('classname')}.{case.get('name')}" for case in failed),
        "skipped": dict(Counter(reasons).most_common()),
    }


def main(arguments: list[str]) -> int:
    facts = records.environment()
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={REPORT}", *arguments]
    status = subprocess.run(command, cwd=records.ROOT).returncode
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return status  # interrupted, or a file that can't be imported: not all tests have run
    kept = ("time", "python", "torch", "triton", "vkd_kernels", "system", "cpu", "cores", "commit")
    record = {"tests": arguments, **{key: facts[key] for key in kept}, **outcome(REPORT)}
    if facts["dirty"]:
        print(f"no record is written from a changed tree: {', '.join(facts['changed'])}")
    else:
        records.write(RECORD, record)
        print(RECORD)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
