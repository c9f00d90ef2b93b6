"""Run folders that survive anything: files that are written whole or not at all, and errors that name what is wrong.

A finished training has a result.json, an unfinished one a checkpoint: see engine.py. workers.py runs many of them.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import multiprocessing
import multiprocessing.util
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import resource_tracker
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


class Worker:
    """What a training knows of the process that started it: whether to stop, and where to report progress. This one:
    nobody asks it to stop, and nobody listens. workers.py has the others."""

    @property
    def signal(self) -> int:
        """Which signal asked it to stop."""
        return signal.SIGINT

    def should_stop(self) -> bool:
        return False

    def report(self, task: str, images: int, expected: int | None = None) -> None:
        """So many images more; `expected`: of so many in all."""


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes started inside inherit the mask: Ctrl-C reaches their parent alone, which then tells them to stop."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    _prepare_for_blocked_children()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@functools.cache
def _prepare_for_blocked_children() -> None:
    resource_tracker.ensure_running()  # its start, with the first process, would unblock both signals
    # At exit multiprocessing ends daemons, such as a loader's, by SIGTERM and waits for them: these would never end.
    multiprocessing.util.Finalize(None, _kill_daemons, exitpriority=1)


def _kill_daemons() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would take their end for a failure
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
            child.join()


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
    """The newest of the runs in `default`, default-2, default-3, ..."""
    name = re.compile(re.escape(default.name) + r"(-\d+)?")
    found = [p for p in default.parent.glob("*/config.yaml") if name.fullmatch(p.parent.name)]
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent if found else None


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
