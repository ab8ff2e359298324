"""What runs in replicas, without a cluster: a shard that takes in changes while files are damaged."""

import asyncio
import os
from pathlib import Path

import pytest
from tests.test_live import batch, made

from askew import live
from askew.deployments import Following
from askew.errors import ArtifactError
from askew.live import Follower, Live


def test_a_shard_whose_log_is_damaged_goes_on_with_what_it_took_in_and_no_new_one_starts(tmp_path: Path) -> None:
    index = made(tmp_path)
    with Live(index) as writer:
        writer.upsert(*batch(["n1"], [50]))
        following = Following(Follower(index), 0, {"shard": "0"})
        [log] = (live.place(index) / live.LOG).glob("*.wal")
        whole = log.stat().st_size
        writer.upsert(*batch(["n2"], [51]))
        writer.upsert(*batch(["n3"], [52]))
    content = bytearray(log.read_bytes())
    content[whole + 100] ^= 1
    log.write_bytes(content)
    for _ in range(2):
        follower = asyncio.run(following.follow())
        assert (follower.last, follower.shard.item("n1") is None, follower.shard.item("n2")) == (1, False, None)
    with pytest.raises(ArtifactError, match=rf"damage at byte {whole:,}"):
        Follower(index)
    os.truncate(log, 0)
    content[whole + 100] ^= 1
    log.write_bytes(content)
    assert asyncio.run(following.follow()).last == 3
