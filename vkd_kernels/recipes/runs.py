"""Run folders that survive anything: atomic files, checkpoints inside a training loop, and the worker processes.

A recipe is a list of `Task`s. Each leaves one JSON file when it is done and a checkpoint while it is not, so an
interrupted recipe goes on where it stopped: finished tasks are skipped, unfinished ones continue bit for bit.
classification.py is the example of how to use it.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch


class RunError(Exception):
    """Something the user can put right; the message says how."""


class Interrupted(Exception):
    """The run was asked to stop. Its checkpoints are on disk."""

    def __init__(self, signal_number: int = signal.SIGINT) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


# ---- files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk, a folder without permission: an error that says so."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; what was there before is intact: when there is room, "
            "continue with --resume"
        ) from error


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """The old file or the new one, never half of one: write beside it, flush to the disk, rename."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        if os.name == "posix":  # the new name itself must reach the disk too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def save_json(path: Path, value: Any) -> None:
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path} ({error}): delete this file to have that part done again") from error


def save_tensors(path: Path, value: Any) -> None:
    buffer = io.BytesIO()  # torch.save into a file hides why the file could not be written
    torch.save(value, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load_tensors(path: Path) -> Any:
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:  # torch.load raises a different type for every kind of damage
        raise RunError(f"cannot read {path} ({error}): delete this file to have that part done again") from error


def save_safetensors(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save

    plain = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    write_atomically(path, lambda file: file.write(save(plain, {"format": "pt"})))


def load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    try:
        return load(path.read_bytes())
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # SafetensorError is no public name
        raise RunError(f"cannot read {path}: {error}") from error


def load_state(part: Any, state: Any, what: str) -> None:
    """`part.load_state_dict(state)`, or a RunError that says what does not fit."""
    if state is None:
        raise RunError(f"{what} is missing: made by another version or another configuration")
    try:
        part.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{what} is of another architecture: {' '.join(str(error).split())[:600]}") from error


def load_json_lines(path: Path) -> list[Any]:
    """The lines of a file that `append` wrote; a last one that was cut short is left out."""
    if not path.exists():
        return []
    lines, found = path.read_text().splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise RunError(f"{path}, line {number}, is not JSON: delete that line") from error
    return found


def append(path: Path, text: str) -> None:
    with writing(path), open(path, "a") as file:
        file.write(text)


def save_csv(path: Path, records: list[dict[str, Any]]) -> None:
    """One column for every name in any of the records."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(name for record in records for name in record), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_text(path, text.getvalue())


# ---- run folders -----------------------------------------------------------------------------------------------------


def free_folder(default: Path) -> Path:
    """`default`, or default-2, default-3, ...: the first that does not exist."""
    number, folder = 1, default
    while folder.exists():
        number += 1
        folder = default.with_name(f"{default.name}-{number}")
    return folder


def newest_folder(default: Path) -> Path | None:
    found = [path for name in ("json", "yaml") for path in default.parent.glob(f"{default.name}*/config.{name}")]
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent if found else None


def start_folder(folder: Path, config: dict[str, Any]) -> None:
    if (folder / "config.json").exists():
        raise RunError(f"{folder} holds a run already: add --resume to continue it, or give another --output")
    save_json(folder / "config.json", {"config": config, "torch": torch.__version__})


def saved_config(folder: Path, typed: dict[str, Any]) -> dict[str, Any]:
    """The configuration a run was started with; refuses any option typed now that has another value there."""
    path = folder / "config.json"
    if not path.exists():
        raise RunError(f"--resume: {folder} holds no run (there is no {path})")
    try:
        saved = json.loads(path.read_text())
        config = {name: tuple(v) if isinstance(v, list) else v for name, v in saved["config"].items()}
        version = saved["torch"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"--resume: cannot read {path} ({error!r}); start again in another --output") from error
    differences = [
        f"--{name.replace('_', '-')} is {config.get(name, 'absent')} there and {value} here"
        for name, value in typed.items()
        if name not in config or config[name] != value
    ]
    if differences:
        raise RunError(f"--resume: {folder} has another configuration: {'; '.join(differences)}")
    if version != torch.__version__:
        print(f"warning: {folder} was begun with torch {version}, this is {torch.__version__}", file=sys.stderr)
    for partial in folder.rglob("*.partial-*"):  # what a killed process was writing
        partial.unlink()
    return config


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time in a run folder (where the system has file locks)."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"{folder} is in use by another process") from error
        yield


# ---- inside a worker -------------------------------------------------------------------------------------------------


class Worker:
    """What a task knows of the process that started it: whether to stop, and where to report progress."""

    def __init__(self, stop: Any, reports: Any) -> None:
        self._stop, self._reports = stop, reports
        self._images, self._sent = 0, 0.0

    @property
    def signal(self) -> int:
        return signal.SIGINT

    def should_stop(self) -> bool:
        return self._stop.is_set()

    def report(self, task: str, images: int, expected: int | None = None) -> None:
        """So many images more; `expected`: of so many in all."""
        self._images += images
        if expected is not None or time.monotonic() - self._sent > 0.1:  # a step may be shorter than sending takes
            self._reports.put((task, self._images, expected))
            self._images, self._sent = 0, time.monotonic()


class Here(Worker):
    """The same for a task that runs in the process that asks for it."""

    def __init__(self, received: list[int], progress: _Progress) -> None:
        self._received, self._progress = received, progress

    @property
    def signal(self) -> int:
        return self._received[0] if self._received else signal.SIGINT

    def should_stop(self) -> bool:
        return bool(self._received)

    def report(self, task: str, images: int, expected: int | None = None) -> None:
        self._progress.add(task, images, expected)


class Loop:
    """The steps of a training loop: resumes, reports progress, saves, and stops when asked to.

    `state` names what must continue: anything with `state_dict` and `load_state_dict`, or a `torch.Generator`.

        loop = Loop(path, steps=600, images_per_step=64, state={"model": model, "optimizer": optimizer}, ...)
        for step in loop:
            ...
            if step % 20 == 0:
                with loop.clock_stopped():
                    loop.curve.append((step, evaluate(model)))
    """

    def __init__(
        self, path: Path, *, task: str, steps: int, images_per_step: int, save_every: int, state: dict[str, Any],
        worker: Worker,
    ) -> None:  # fmt: skip
        self.path, self.task, self.steps, self.images_per_step = path, task, steps, images_per_step
        self.save_every, self.state, self.worker = save_every, state, worker
        self.step = 0
        self.seconds = 0.0  # wall time of the steps alone: no evaluation, no checkpoints
        self.cpu_seconds = 0.0  # the same in this process's processor time, which other programs do not stretch
        self.curve: list[tuple[int, float]] = []

    def __iter__(self) -> Iterator[int]:
        if self.path.exists():
            self._load()
        self.worker.report(self.task, self.step * self.images_per_step)
        while self.step < self.steps:
            if self.worker.should_stop():
                self.save()
                raise Interrupted
            self._clock(+1)
            yield self.step
            self._clock(-1)
            self.step += 1
            self.worker.report(self.task, self.images_per_step)
            if self.step % self.save_every == 0:
                self.save()

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        self._clock(-1)
        yield
        self._clock(+1)

    def _clock(self, direction: int) -> None:
        self.seconds -= direction * time.perf_counter()
        self.cpu_seconds -= direction * time.process_time()

    def save(self) -> None:
        parts = {k: v.get_state() if isinstance(v, torch.Generator) else v.state_dict() for k, v in self.state.items()}
        progress = {"step": self.step, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "curve": self.curve}
        save_tensors(self.path, {"parts": parts, "progress": progress, "rng": torch.get_rng_state()})

    def _load(self) -> None:
        saved = load_tensors(self.path)
        for name, part in self.state.items():
            if isinstance(part, torch.Generator):
                part.set_state(saved["parts"][name])
            else:
                part.load_state_dict(saved["parts"][name])
        torch.set_rng_state(saved["rng"])
        for name, value in saved["progress"].items():
            setattr(self, name, value)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- the workers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    name: str
    result: Path  # exists when the task is done
    images: int  # how many images it trains on, for the progress bar
    work: Callable[..., None]  # called in a worker process as work(*arguments, worker)
    arguments: tuple[Any, ...]
    after: str | None = None  # the task that must be done before


_worker: Worker | None = None


def _start_worker(stop: Any, reports: Any) -> None:
    global _worker
    torch.set_num_threads(1)  # one core each; also makes the numbers independent of how many cores there are
    _worker = Worker(stop, reports)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A killed parent cannot tell its workers to stop; its pipe closes. Files are atomic: leaving at once is safe."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _perform(task: Task) -> None:
    task.work(*task.arguments, _worker)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Worker processes inherit the mask: Ctrl-C reaches the parent alone, which then tells them to save and stop."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def perform(tasks: list[Task], *, jobs: int, quiet: bool = False) -> None:
    """Do what is not done yet, in up to `jobs` processes. SIGINT and SIGTERM end it with `Interrupted`, resumably."""
    done = {task.name for task in tasks if task.result.exists()}
    waiting = [task for task in tasks if task.name not in done]
    if not waiting:
        return
    context = multiprocessing.get_context("spawn")
    stop, reports = context.Event(), context.Queue()
    failure: BaseException | None = None
    running: dict[Future, Task] = {}
    jobs = min(jobs, len(waiting))
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(stop, reports))
    with (
        _signals_caught(stop.set, quiet) as received,
        pool,
        _Progress(waiting, len(done), quiet) as progress,
    ):
        while running or (waiting and not stop.is_set()):
            ready = [t for t in waiting if t.after is None or t.after in done] if not stop.is_set() else []
            for task in ready[: jobs - len(running)]:  # no queue inside the pool: nothing to cancel when stopping
                waiting.remove(task)
                with _signals_blocked():
                    running[pool.submit(_perform, task)] = task
            finished, _ = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
            progress.read(reports)
            for future in finished:
                task, error = running.pop(future), future.exception()
                if error is None:
                    done.add(task.name)
                    progress.finished(task)
                elif not isinstance(error, Interrupted):
                    failure = failure or error
                    stop.set()
    if isinstance(failure, BrokenProcessPool):
        raise RunError("a worker process was killed (out of memory?): continue with --resume") from failure
    if failure is not None:
        raise failure
    if received:
        raise Interrupted(received[0])


def perform_here(tasks: list[Task], *, quiet: bool = False, insist: bool = False) -> None:
    """The same one after the other in this process: on an accelerator, or as one of torchrun's ranks."""
    done = {task.name for task in tasks if task.result.exists()}
    waiting = [task for task in tasks if task.name not in done]
    with (
        _signals_caught(lambda: None, quiet, insist=insist) as received,
        _Progress(waiting, len(done), quiet) as progress,
    ):
        for task in waiting:
            task.work(*task.arguments, Here(received, progress))
            progress.finished(task)


@contextlib.contextmanager
def _signals_caught(stop: Callable[[], None], quiet: bool, insist: bool = False) -> Iterator[list[int]]:
    """SIGINT and SIGTERM call `stop` and are listed; the second one ends the process at once, unless it has to
    `insist` on its checkpoint: torchrun passes a Ctrl-C on that the terminal has sent already, and kills in the end."""
    received: list[int] = []

    def on_signal(number: int, frame: Any) -> None:
        if received and not insist:  # the last checkpoints are still good
            os._exit(128 + number)
        if not received and not quiet:
            again = "" if insist else " (once more to quit at once)"
            print(f"\nstopping: saving checkpoints{again}", file=sys.stderr, flush=True)
        received.append(number)
        stop()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Progress:
    """One bar over everything to be trained on: images, images per second, time left; and what is running now."""

    def __init__(self, waiting: list[Task], done: int, quiet: bool) -> None:
        from tqdm import tqdm

        self.tasks, self.done, self.quiet = done + len(waiting), done, quiet
        self.expected = {task.name: task.images for task in waiting}
        self.current: dict[str, int] = {}
        self.terminal = sys.stderr.isatty()
        size = shutil.get_terminal_size((110, 24))  # tqdm itself shows nothing on a terminal of unknown size
        self.bar = tqdm(
            total=sum(self.expected.values()), unit="img", unit_scale=True, disable=quiet, smoothing=0.05,
            ncols=size.columns, nrows=size.lines,
            mininterval=0.2 if self.terminal else 15,
        )  # fmt: skip

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bar.close()

    def read(self, reports: Any) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self.add(*reports.get_nowait())
        self._describe()

    def add(self, task: str, images: int, expected: int | None) -> None:
        if expected is not None:
            self.bar.total += expected - self.expected[task]
            self.expected[task] = expected
        self.current[task] = self.current.get(task, 0) + images
        self._describe()
        self.bar.update(images)

    def finished(self, task: Task) -> None:
        self.done += 1
        self.bar.update(
            self.expected[task.name] - self.current.pop(task.name, 0)
        )  # what it did not report, e.g. before a resume
        self._describe()

    def _describe(self) -> None:
        self.bar.set_description_str(f"{self.done}/{self.tasks} runs [{', '.join(self.current)}]", refresh=False)
