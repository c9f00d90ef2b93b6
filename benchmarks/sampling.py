"""Samplers take turns until each has its samples, in an attempt that other processes did not disturb."""

import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TURN_S = 0.02  # a sampler's turn is as many samples as fit into this time
WARM_S = 5e-3  # the first sample of a turn, which warms the caches up, counts if it took at least this time
MOST_OTHERS_SHARE = 0.05  # of the processors' time that other processes may take, for CPU times that mean something


def interleave(samplers: dict[Any, Callable[[], float]], seconds: float, least: int = 3, most: int = 200) -> dict:
    """{key: samples}: the samplers take turns, in another random order each time.

    Each stops after `seconds` of its own, but not before `least` samples.

    A turn is as many samples as fit TURN_S. The first follows another sampler's turn and warms the caches up again: it
    counts only where it took so long that this is a small part of it.
    """
    samples = {key: [] for key in samplers}
    spent = dict.fromkeys(samplers, 0.0)
    order = random.Random(0)
    while True:
        active = [k for k, s in samples.items() if len(s) < most and (len(s) < least or spent[k] < seconds)]
        if not active:
            return samples
        for key in order.sample(active, len(active)):
            began = time.perf_counter()
            first = samplers[key]()
            if time.perf_counter() - began >= WARM_S:  # of all sets: `first` is of one call
                samples[key].append(first)
            while time.perf_counter() - began < TURN_S and len(samples[key]) < most:
                samples[key].append(samplers[key]())
            spent[key] += time.perf_counter() - began


def summary(samples: list[float]) -> dict:
    """Median and spread in seconds, and the samples' number."""
    ordered = sorted(samples)
    tenth = (len(ordered) - 1) / 10
    return {
        "median_s": statistics.median(ordered),
        "p10_s": ordered[round(tenth)],
        "p90_s": ordered[round(9 * tenth)],
        "samples": len(ordered),
    }


class OtherProcesses:
    """How much of the processors' time other processes take: `share()` since it was made, None where it can't be told.

    On a few cores another process stretches a parallel region far beyond its own share of the time, so that a record
    with more than a few per cent here says little about either side of a ratio.
    """

    def __init__(self):
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float] | None:
        """Seconds, over all processors, that the machine was busy and that it had; this process's own taken out."""
        path = Path("/proc/stat")
        if not path.exists():
            return None
        user, nice, system, idle, wait, irq, soft, steal = map(int, path.read_text().split(maxsplit=9)[1:9])
        per_second = os.sysconf("SC_CLK_TCK")
        busy = (user + nice + system + irq + soft + steal) / per_second
        return busy - sum(os.times()[:4]), busy + (idle + wait) / per_second

    def share(self) -> float | None:
        if self.start is None:
            return None
        (busy, total), (busy_then, total_then) = self._now(), self.start
        return round(max(0.0, (busy - busy_then) / max(total - total_then, 1e-9)), 3)


def sample_undisturbed(samplers: dict, seconds: float, least: int, tries: int) -> tuple[float | None, dict]:
    """(others' share, samples) of the first try in which others took little, or else of the one with the least.

    Only the others' share decides, never what was measured.
    """
    attempts = []
    for _ in range(tries):
        others = OtherProcesses()
        samples = interleave(samplers, seconds, least)
        attempts.append((others.share(), samples))
        if attempts[-1][0] is None or attempts[-1][0] <= MOST_OTHERS_SHARE:
            return attempts[-1]
    return min(attempts, key=lambda pair: pair[0])
