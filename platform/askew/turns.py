"""Turns: of this user's processes on this machine, one at a time does a heavy thing; the others wait.

What a replica loads beside what it answers takes processor time from all of them: one after the other, they take a
core each time, and not all cores at once. The turn of a process that dies ends with it, and who has waited long
for one that hangs goes on without a turn.
"""

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST_S, EVERY_S = 30.0, 0.02


@contextmanager
def turn(name: str, longest_s: float = LONGEST_S) -> Iterator[None]:
    """Wait for the turn of a name, but no longer than that, and hold it meanwhile."""
    path = Path(tempfile.gettempdir()) / f"askew-{name}-{os.getuid()}.lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        until = time.monotonic() + longest_s
        while not _taken(handle) and time.monotonic() < until:
            time.sleep(EVERY_S)
        yield
    finally:
        os.close(handle)


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
