"""What a replica sees of the others, without a cluster: handles, and a switch that does as it is told."""

import asyncio
import functools
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from askew.releases import Release
from askew.wire import Listener

SCHEMA = pa.schema([("item_id", pa.string()), ("fields", pa.struct([("colour", pa.string())]))])
run = asyncio.Runner().run  # one loop: connections outlive a search


def handle(*, wired: Mapping[str, Any] | None = None, **methods: Any) -> Any:
    """What a deployment's handle looks like: methods that it calls, and where others are answered."""
    if wired is not None:
        methods["address"] = functools.partial(Listener(wired).address, "127.0.0.1")
    return SimpleNamespace(**{name: SimpleNamespace(remote=method) for name, method in methods.items()})


def release(schema: pa.Schema = SCHEMA, sizes: Sequence[int] = (7, 3), **how: Any) -> Release:
    about = {"name": "shop", "version": "3", "model": "m", "index": "i", "identity": "release"}
    keys = {"model_key": "m", "index_key": "i", "sizes": sizes, "schema_": schema.serialize().to_pybytes()}
    return Release.model_validate(about | keys | how)


class FakeSwitch:
    """Tells what is live and what is held, as it is set."""

    def __init__(self, *releases: Release) -> None:
        self.releases, self.live, self.reports = list(releases), releases[0].key, dict[str, Any]()
        self.shadow, self.looks = "", 0

    async def look(self) -> None:
        self.looks += 1

    async def report(self, kind: str, who: str, held: Any, failed: Any, seen: Any) -> dict[str, Any]:
        self.reports[kind] = (held, failed, seen)
        told = {"since": "now", "previous": None, "candidate": None, "note": ""}
        return {
            "serve": self.live,
            "shadow": self.shadow,
            "hold": [one.model_dump() for one in self.releases],
            "told": told,
        }


def deployed(kind: Any, switch: FakeSwitch, *given: Any, first: Any = None, **how: Any) -> Any:
    """What a replica has, as Serve makes it."""
    one, wired = kind.__new__(kind), handle(wired={"report": switch.report, "look": switch.look})
    run(one.__init__(*([first] if first else []), wired, *given, **how))
    return one
