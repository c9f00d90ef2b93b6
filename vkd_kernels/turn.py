"""Threads that share a module take turns: its hooks see one pass at a time."""

import threading


class Turn:
    """A lock that copies and pickles of a module leave behind: each makes its own."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def __deepcopy__(self, memo: dict) -> "Turn":
        return Turn()

    def __reduce__(self) -> tuple:
        return Turn, ()
