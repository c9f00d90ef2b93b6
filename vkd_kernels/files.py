"""Files that are whole or absent, whatever happens while they are written."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

PARTIAL = "*.partial-*"  # what a process is writing, or was writing when it was killed


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields where to write; what was written there gets its name when it is complete and on the disk."""
    partial = path.with_name(f"{path.name}.partial-{socket.gethostname()}-{os.getpid()}")
    try:
        yield partial
        with open(partial, "rb+") as file:
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
