"""When the harness samples what, and on how many sets of inputs: on a clock of the tests' own."""

import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import floors, harness, sampling
from benchmarks.harness import Calls, Candidate, Case
from tests.test_benchmarks import RATES


class Clock:
    """Stands for the module time: time passes when somebody sleeps, whatever else the machine does."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (harness, sampling):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_samples_are_of_the_pass_they_name(clock):
    slow = Calls(lambda: clock.sleep(0.02), lambda _: clock.sleep(0.04))
    runner = harness.Runner(Candidate("sleeper", lambda inputs: slow), [None, None], "cpu")
    for which, expected in (("forward", 0.02), ("backward", 0.04), ("both", 0.06)):
        samples = sampling.interleave({which: lambda which=which: runner.sample(which)}, 0.0)[which]
        assert samples == pytest.approx([expected] * 3)


def test_candidates_take_turns(clock):
    order = []

    def sampler(name, seconds):
        order.append(name)
        clock.sleep(seconds)
        return seconds

    samples = sampling.interleave({"a": lambda: sampler("a", 0.03), "b": lambda: sampler("b", 0.06)}, 0.1, least=2)
    assert [sorted(order[:2]), sorted(order[2:4]), order[4:]] == [["a", "b"], ["a", "b"], ["a", "a"]]  # in any order
    assert samples == {"a": [0.03] * 4, "b": [0.06] * 2}


def sleeper(clock, forward, backward=0.0):
    """A candidate of which one call takes so long."""
    calls = Calls(lambda: clock.sleep(forward), lambda _: clock.sleep(backward))
    return Candidate("sleeper", lambda inputs: calls)


@pytest.mark.parametrize("sets, seconds", [(1, 1e-3), (1, 0.012), (1, 0.1), (64, 1e-5), (64, 3e-4), (64, 4e-3)])
@pytest.mark.parametrize("which", harness.PASSES)
def test_every_candidate_gets_its_samples(clock, sets, seconds, which):
    """However short a call and however long a sample of all sets: neither is the other's measure."""
    runner = harness.Runner(sleeper(clock, seconds, seconds), [None] * sets, "cpu")
    runs = iter(range(1000))  # a candidate that never gets a sample would be asked for ever
    samples = sampling.interleave({which: lambda: (next(runs), runner.sample(which))[1]}, 0.2)[which]
    assert len(samples) >= 3 and samples == pytest.approx([seconds * (1 + (which == "both"))] * len(samples))


@pytest.mark.parametrize("seconds, counts", [(4e-3, False), (6e-3, True), (0.03, True)])
def test_the_first_sample_of_a_turn_counts_if_it_is_long(clock, seconds, counts):
    calls = []

    def sampler():
        calls.append(seconds)
        clock.sleep(seconds)
        return seconds / 64

    samples = sampling.interleave({"a": sampler}, 0.0, least=1)["a"]
    assert len(calls) - len(samples) == (0 if counts else 1)


@pytest.mark.parametrize("seconds, sets", [(1e-4, 64), (1e-3, 20), (6e-3, 3), (0.13, 1)])
def test_slow_candidates_go_through_fewer_sets_of_inputs(clock, seconds, sets, monkeypatch):
    monkeypatch.setattr(harness, "number_of_sets", lambda input_bytes, device: 64)
    built = []
    slow = sleeper(clock, seconds)
    slow.build = lambda inputs, build=slow.build: built.append(inputs) or build(inputs)
    one = Case(
        name="slow",
        parameters={},
        dtype="float32",
        cost=floors.Cost(1, 1),
        inputs=lambda seed: seed,
        input_bytes=1,
        candidates=[slow],
        limits={},
        passes=("both",),
    )
    result = harness.measure(one, "cpu", RATES, 0.0, memory=False)
    (row,) = result["rows"]
    assert len(built) == sets == row.get("sets_of_inputs", 64) and result["sets_of_inputs"] == 64
    assert row["median_s"] == pytest.approx(seconds)


def test_a_graph_goes_through_every_set_of_inputs(clock):
    candidate = sleeper(clock, 0.1)
    candidate.graph = True
    runner = harness.Runner(candidate, [0], "cpu")
    runner.add_sets([1, 2, 3])
    assert len(runner.calls) == 4 and clock.now == 0.0


@pytest.mark.parametrize("which", harness.PASSES)
def test_on_a_gpu_a_pause_comes_before_the_events(which, monkeypatch):
    """The host starts the work while the GPU pauses, in every pass."""
    happened = []

    class Event:
        def __init__(self, enable_timing):
            self.record = lambda: happened.append("event")
            self.synchronize = lambda: happened.append("wait")
            self.elapsed_time = lambda end: 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: happened.append("pause"), raising=False)
    calls = Calls(lambda: happened.append("forward"), lambda _: happened.append("backward"))
    runner = harness.Runner(Candidate("any", lambda inputs: calls), [None], "cuda")
    assert runner.sample(which) == 2e-3
    timed = {"forward": ["forward"], "backward": ["backward"], "both": ["forward", "backward"]}[which]
    assert happened[-len(timed) - 4 :] == ["pause", "event", *timed, "event", "wait"]


@pytest.mark.parametrize("seconds, pause", [(1e-6, harness.PAUSE_S), (1e-4, 6.4e-3), (0.13, harness.SAMPLE_S)])
def test_the_pause_lasts_as_long_as_the_host_takes_for_all_sets(clock, seconds, pause, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    runner = harness.Runner(sleeper(clock, seconds), [0], "cuda")
    runner.add_sets([*range(63)])
    assert runner.pause_s == pytest.approx(pause)


def test_summary():
    assert sampling.summary([3.0, 1.0, 2.0, 5.0, 4.0]) == {"median_s": 3.0, "p10_s": 1.0, "p90_s": 5.0, "samples": 5}


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="needs /proc/stat")
def test_the_share_of_other_processes_is_not_ones_own():
    others = sampling.OtherProcesses()
    began = time.process_time()
    while time.process_time() - began < 0.5:
        pass
    alone = others.share()
    assert 0 <= alone <= 1
    spin = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        for _ in range(60):  # until it has started, and the machine has time for it
            others = sampling.OtherProcesses()
            time.sleep(1)
            # 60 %: it may have to share a core; this process sleeps.
            if others.share() * os.cpu_count() >= 0.6:
                break
        else:
            pytest.fail(f"another process spins, and its share is {others.share()}")
    finally:
        spin.kill()
        spin.wait()


@pytest.mark.parametrize("shares, chosen", [([0.3, 0.04, 0.0], 1), ([0.3, 0.2, 0.25], 1), ([None], 0)])
def test_a_disturbed_case_is_measured_again(shares, chosen, monkeypatch):
    remaining, rounds = iter(shares), iter([{"a": [1.0]}, {"a": [2.0]}, {"a": [3.0]}])
    monkeypatch.setattr(sampling.OtherProcesses, "share", lambda self: next(remaining))
    monkeypatch.setattr(sampling, "interleave", lambda *arguments: next(rounds))
    share, samples = sampling.sample_undisturbed({}, 0.0, 1, tries=3)
    assert share == shares[chosen] and samples == {"a": [chosen + 1.0]}
