"""What the endpoint counts and times: Ray gives it to Prometheus, on the metrics port of each node.

`serve_configs/grafana.json` shows all of it. Knows nothing of what is measured.
"""

import logging
import re
import time
import traceback
from collections import Counter as Count

from ray.util.metrics import Gauge

from askew.tallies import Spread, Tally, Teller

MS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]
SIZES = [1, 2, 5, 10, 20, 32, 64]

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # what ends a line, or a terminal obeys
ATTRIBUTES = ("request_id", "route")  # of a record: what Serve takes from a request

serve = logging.getLogger("ray.serve")  # written as text or as JSON, with the replica and the request's id
log = serve.getChild("askew")

SEARCH_MS = Spread("askew_search_ms", "Milliseconds of the parts of searches", MS, "part")  # of all Serve has one
SEARCHES = Tally("askew_searches", "Searches by how they ended", "outcome")
BATCH = Spread("askew_batch", "Searches that went on together", SIZES)
WAITING = Gauge("askew_waiting", "Searches that wait in an ingress replica")
CACHED = Tally("askew_cached", "What was looked for in a cache", "cache", "found")
HEDGED = Tally("askew_hedged", "Calls that were made twice", "of")
MISSED = Tally("askew_missed", "Calls of a shard without an answer", "shard")
RELEASE = Gauge("askew_release", "1 for what is served", tag_keys=("model", "version", "index"))
RECALL = Gauge("askew_recall_at_10_live", "Share of the exact ten best that live searches find, of the last 500")
SHARD_MS = Spread("askew_shard_ms", "Milliseconds that a shard searched", MS, "shard")
SHARD_ITEMS = Gauge("askew_shard_items", "Items that a shard can find", tag_keys=("shard",))
CHANGE = Gauge("askew_change", "The last change of the index that a shard has taken in", tag_keys=("shard",))
PROXY = Gauge("askew_proxy", "1 where a search comes through the proxy of a node, 0 where not", tag_keys=("node",))
PROXY_RESTARTS = Tally("askew_proxy_restarts", "Proxies that were restarted, for no search came through", "node")
WRITTEN = Tally("askew_written", "Items that were upserted, deleted or refused", "what")

teller = Teller([SEARCH_MS, SEARCHES, BATCH, CACHED, HEDGED, MISSED, SHARD_MS, PROXY_RESTARTS, WRITTEN])


def escaped(text: str) -> str:
    """Write control characters as Python does, so that what a request holds ends no line of a log."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Escaping(logging.Filter):
    """Keeps a record to its own line; a traceback's lines are set in, so that none looks like a record."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Escape what a record holds; none is dropped."""
        record.msg, record.args = escaped(record.getMessage()), None
        if record.exc_info and record.exc_info[0] and not record.exc_text:
            lines = "".join(traceback.format_exception(*record.exc_info)).splitlines()
            record.exc_text = "\n".join(f"    {escaped(line)}" for line in lines)
        for name in ATTRIBUTES:
            if isinstance(value := getattr(record, name, None), str):
                setattr(record, name, escaped(value))
        return True


def escape() -> None:
    """Have all that this process logs escaped: its messages, and what Serve's handlers add to them.

    Without an access log none is made: Serve makes a record of each request and drops it in the end, and so of
    what Serve itself says only warnings are left.
    """
    access, level = logging.makeLogRecord({"serve_access_log": True}), serve.getEffectiveLevel()
    if level < logging.WARNING and serve.handlers and not any(one.filter(access) for one in serve.handlers):
        log.setLevel(level)
        serve.setLevel(logging.WARNING)
    for one in (serve, *serve.handlers):
        if not any(isinstance(known, Escaping) for known in one.filters):
            one.addFilter(Escaping())


class Warner:
    """Warns of the same thing once a second at most, ever more seldom while it lasts, and tells how often it was.

    What goes wrong under load goes wrong a thousand times, and writing that down would make it worse.
    """

    def __init__(self, every_s: float = 1.0, at_least_every_s: float = 60.0) -> None:
        self._every_s, self._most_s = every_s, at_least_every_s
        self._due, self._pause, self._times = dict[str, float](), dict[str, float](), Count[str]()

    def warn(self, what: str, message: str, **extra: object) -> None:
        """Warn of `what`, with this message and what goes along with it."""
        self._times[what] += 1
        now, due = time.monotonic(), self._due.get(what, float("-inf"))
        if now >= due:
            lasts = now < due + self._most_s
            self._pause[what] = min(2 * self._pause[what], self._most_s) if lasts else self._every_s
            self._due[what] = now + self._pause[what]
            log.warning("%s (%d times)", message, self._times.pop(what), extra=extra)


warner = Warner()
