"""What may take its time gives way: its thread, and no other of the process."""

import asyncio
import os
import sys
import threading

import pytest

from askew import gently


def nice() -> tuple[int, int]:
    thread = threading.get_native_id()
    return thread, os.getpriority(os.PRIO_PROCESS, thread)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own here")
def test_work_is_done_in_threads_that_come_last_and_others_stay_as_they_are() -> None:
    here, before = nice()
    thread, priority = asyncio.run(gently.to_thread(nice))
    assert (thread != here, priority) == (True, gently.LAST)
    assert nice() == (here, before)
    assert asyncio.run(asyncio.to_thread(nice))[1] == before


def test_what_it_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        asyncio.run(gently.to_thread(divmod, 1, 0))
