"""One process at a time has the turn, and one that is killed leaves it to the next."""

import subprocess
import sys
import threading
import time
import uuid

from askew import turns

HOLD = (
    "import sys, time; from askew import turns\nwith turns.turn(sys.argv[1]): print(1, flush=True); time.sleep(60)"
)


def test_threads_and_processes_wait_for_their_turn() -> None:
    name, order = f"test-{uuid.uuid4().hex[:8]}", list[str]()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, name], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()  # it has the turn

    def take(who: str) -> None:
        with turns.turn(name):
            order.append(f"{who} begins")
            time.sleep(0.05)
            order.append(f"{who} ends")

    waiting = [threading.Thread(target=take, args=(who,)) for who in ("one", "other")]
    for thread in waiting:
        thread.start()
    time.sleep(0.3)
    assert order == []
    with turns.turn(name, longest_s=0.1):  # who has waited so long goes on without it
        assert order == []
    holder.kill()
    for thread in waiting:
        thread.join(10)
    holder.communicate()
    first, last = ("one", "other") if order[0].startswith("one") else ("other", "one")
    assert order == [f"{first} begins", f"{first} ends", f"{last} begins", f"{last} ends"]
    with turns.turn(f"{name}-other"), turns.turn(name):
        pass
