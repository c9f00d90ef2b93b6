"""Files of a run that survive anything: written whole or not at all, and errors that name what is wrong with one."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from filelock import FileLock, Timeout

from ..checkpoints import read_weights
from ..files import PARTIAL, partial_files, whole_file

MACHINE = "machine.json"  # where a run was begun


class RunError(Exception):
    """Something the user can put right; the message says how."""

    def __init__(self, message: str) -> None:
        # PyTorch raises it again with the traceback of a DataLoader's worker, which ends in "Name: message".
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


# ---- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk, a folder without permission: an error that says so."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; what was there before is intact: when this is put right, "
            "continue with --resume"
        ) from error


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """The old file or the new one, never half of one."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def save_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def save_tensors(path: Path, value: Any) -> None:
    buffer = io.BytesIO()  # torch.save into a file hides why the file could not be written
    torch.save(value, buffer)
    write_bytes(path, buffer.getbuffer())


def save_safetensors(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    write_bytes(path, safetensors.torch.save(plain, {"format": "pt"}))


# ---- reading ---------------------------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    """What `save_json` or `save_tensors` wrote."""
    try:
        of_tensors = path.suffix != ".json"
        value = torch.load(path, map_location="cpu", weights_only=True) if of_tensors else json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError(f"it holds {type(value).__name__}, not a dictionary")
    except Exception as error:  # torch.load raises another type for every kind of damage
        raise RunError(f"cannot read {path} ({error}): delete this file to have that part done again") from error
    return value


def sha256(path: Path) -> str:
    """Of a file's content."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def load_weights(path: Path, option: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a file: see `read_weights`."""
    try:
        return read_weights(path)
    except ValueError as error:
        raise RunError(f"{option}: {error}" if option else str(error)) from error


def load_state(part: Any, state: Any, what: str, *, hint: str = "", assign: bool = False) -> None:
    """`part.load_state_dict(state)`, or an error that says what does not fit, and `hint`."""
    try:
        part.load_state_dict(state, **({"assign": True} if assign else {}))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split())[:600].rstrip(".")
        raise RunError(f"{what} is of another architecture: {said}{hint}") from error


def is_run(folder: Path) -> bool:
    """Whether the command has begun a run there: a config.yaml alone may be the user's own."""
    return (folder / "config.yaml").is_file() and (folder / MACHINE).is_file()


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Holds a run folder, which must be new, empty or a run's, for this process alone."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()} - {".lock", MACHINE}  # a run that ended at once has these
        begun = (f"{MACHINE}.", "config.yaml.")  # or a part of what it writes first
        others = {name for name in names if not (PARTIAL.fullmatch(name) and name.startswith(begun))}
        if others and not is_run(folder):
            raise RunError(f"--output: {folder} is neither empty nor a run of this program (it holds {min(others)})")
        try:
            lock = FileLock(folder / ".lock", timeout=0).acquire()
        except Timeout as error:
            raise RunError(f"{folder} is in use by another process") from error
    with lock:
        for partial in partial_files(folder):  # what a killed process was writing
            partial.unlink()
        yield
