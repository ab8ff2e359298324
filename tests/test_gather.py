"""Gathered loss and gradients on two processes equal those of one process over the whole batch."""

import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from askew.gather import gathered, gathered_rows, mean, rank
from askew.losses import info_nce

WORLD, SHARE, DIM = 2, 3, 4


def sides() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries, items = torch.randn(2, WORLD * SHARE, DIM, generator=generator)
    return queries, items


def loss_of_share(queries: Tensor, items: Tensor) -> Tensor:
    target = torch.arange(SHARE) + rank() * SHARE
    everything = gathered(items)
    return info_nce(queries, everything, target, torch.tensor(2.0), torch.zeros(SHARE, len(everything)).bool())


def share(number: int, port: int, out: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=number, world_size=WORLD)
    mine = slice(number * SHARE, (number + 1) * SHARE)
    queries, items = (side[mine].clone().requires_grad_() for side in sides())
    loss = loss_of_share(queries, items)
    loss.backward()
    rows = gathered_rows(torch.arange(2) + 10 * number)
    torch.save(
        {"loss": loss.detach(), "q": queries.grad, "i": items.grad, "rows": rows, "mean": mean(number)},
        f"{out}/{number}.pt",
    )
    dist.destroy_process_group()


def test_two_workers_are_one_of_twice_the_batch(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(share, (port, str(tmp_path)), nprocs=WORLD)
    parts = [torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in range(WORLD)]
    queries, items = (side.requires_grad_() for side in sides())
    n = WORLD * SHARE
    whole = info_nce(queries, items, torch.arange(n), torch.tensor(2.0), torch.zeros(n, n).bool())
    whole.backward()
    assert torch.allclose(torch.stack([p["loss"] for p in parts]).mean(), whole)
    for name, side in (("q", queries), ("i", items)):  # DDP then divides by the number of workers
        assert torch.allclose(torch.cat([p[name] for p in parts]) / WORLD, side.grad)  # type: ignore[arg-type]
    assert parts[0]["rows"].tolist() == [0, 1, 10, 11]
    assert [p["mean"] for p in parts] == [0.5, 0.5]


def test_one_worker_needs_no_group() -> None:
    vectors = torch.randn(2, 3)
    assert gathered(vectors) is vectors
    assert gathered_rows(torch.arange(2)).tolist() == [0, 1]
    assert mean(3.0) == 3.0
