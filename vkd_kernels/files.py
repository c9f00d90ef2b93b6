"""Files that are whole or absent, whatever happens while they are written."""

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

PARTIAL = re.compile(r".+\.partial-(?P<host>.+)-(?P<pid>\d+)")  # a user's own drafts have other names


def partial_files(folder: Path) -> list[Path]:
    """What a process is writing in the folder and below, or was writing when it was killed."""
    return [path for path in folder.rglob("*.partial-*") if PARTIAL.fullmatch(path.name) and path.is_file()]


def abandoned_files(folder: Path) -> list[Path]:
    """Those of the partial files that nobody completes: of this process, or of processes of this host that ended."""
    return [path for path in partial_files(folder) if _is_abandoned(path.name)]


def _is_abandoned(name: str) -> bool:
    match = PARTIAL.fullmatch(name)
    if match is None or match["host"] != socket.gethostname():
        return False
    pid = int(match["pid"])
    if pid == os.getpid():
        return True
    if os.name != "posix":  # where os.kill would end the process
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # it runs, and is somebody else's
        pass
    return False


def partial_file(path: Path) -> Path:
    """What this process calls the file until it is complete."""
    return path.with_name(f"{path.name}.partial-{socket.gethostname()}-{os.getpid()}")


@contextlib.contextmanager
def whole_file(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yields where to write; what was written there gets its name when it is complete and on the disk.

    Without ``replace`` a file that has the name by then stays: of several processes the first one's counts.
    """
    partial = partial_file(path)
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        if replace:
            os.replace(partial, path)
        else:
            _name_if_free(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if os.name == "posix":  # the new name itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some file systems, of networks for instance, take only files
                os.fsync(folder)
        finally:
            os.close(folder)


def _name_if_free(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links, where two processes at the very same time go unnoticed
        if not path.exists():
            os.replace(partial, path)
