"""Gently: work beside what is answered, in threads that the system lets everything else go before.

A thread's priority is its own on Linux; elsewhere such a thread is like any other.
"""

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
LAST, AT_ONCE = 19, 4


def _give_way() -> None:
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LAST)


_threads = ThreadPoolExecutor(AT_ONCE, "gentle", _give_way)


async def to_thread(call: Callable[..., T], *what: object) -> T:
    """Call in such a thread, and return what it returns or raise what it raises."""
    return await asyncio.get_running_loop().run_in_executor(_threads, call, *what)
