"""Triton's own path to a launch, over a stub of libcuda: every launch of every form is accepted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

stub = pytest.importorskip("benchmarks.host_time.stub", reason="needs the repository's benchmarks")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(stub.why_not() is not None, reason=f"needs gcc and Triton: {stub.why_not()}")
def test_every_launch_is_accepted():
    """Descriptors, tuples, argument checks, limits of the grid; the second call by the kernel that was kept."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.host_time", "--check"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stdout + run.stderr
    launches = [int(count) for count in re.findall(r" (\d+) launches", run.stdout)]
    assert len(launches) > 30 and all(count and count % 2 == 0 for count in launches)
