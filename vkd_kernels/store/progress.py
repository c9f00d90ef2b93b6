"""What a build says on standard error: sizes at the start, then speed and the time that is left."""

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .manifest import Manifest

REPORT_EVERY = 10.0  # seconds


class Progress:
    """Rank 0 speaks, and takes the others to be as fast as itself."""

    def __init__(self, folder: Path, manifest: Manifest, missing: Sequence[int], ranks: int, enabled: bool):
        self.folder, self.ranks, self.enabled = folder, ranks, enabled
        self.samples = sum(len(manifest.rows_of(shard)) for shard in missing)
        self.done = 0
        self.started = time.monotonic()
        self.reported = self.started - REPORT_EVERY  # the first batch gives the first estimate
        if missing:
            finished = manifest.shards - len(missing)
            self.say(
                f"{manifest.samples} samples, {in_words(manifest.samples * manifest.sample_bytes)} in "
                f"{manifest.dtype} ({in_words(manifest.sample_bytes)} each), {manifest.shards} shards"
                + (f", {finished} of them finished" if finished else "")
                + (f", {ranks} ranks" if ranks > 1 else "")
                + f"; {in_words(shutil.disk_usage(folder).free)} free"
            )

    def say(self, text: str) -> None:
        if self.enabled:
            print(f"{self.folder}: {text}", file=sys.stderr, flush=True)

    def add(self, samples: int) -> None:
        self.done = min(self.done + samples * self.ranks, self.samples)
        now = time.monotonic()
        if now - self.reported >= REPORT_EVERY:
            self.reported = now
            speed = self.done / max(now - self.started, 1e-9)
            left = duration((self.samples - self.done) / speed)
            self.say(f"{self.done} of {self.samples} samples, {speed:.0f}/s, {left} left")

    def end(self) -> None:
        self.say(f"complete after {duration(time.monotonic() - self.started)}")


def in_words(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
