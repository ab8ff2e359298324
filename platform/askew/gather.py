"""Gathering vectors from all training workers, with gradients flowing back to each.

A batch of B pairs on each of W workers then sees W × B items. Source: open_clip's `gather_with_grad`.
Knows torch.distributed and nothing else.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Return this worker's rank; 0 outside a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Return the number of workers; 1 outside a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local_BD: Tensor) -> Tensor:
        parts = [torch.empty_like(local_BD) for _ in range(world())]
        dist.all_gather(parts, local_BD)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total_ND = grads[0].contiguous()
        dist.all_reduce(total_ND)
        return total_ND.chunk(world())[rank()]


def gathered(local_BD: Tensor) -> Tensor:
    """Concatenate every worker's (B, D) to (W·B, D) in order of rank; gradients reach their owners, summed.

    B must be the same on every worker.
    """
    if world() == 1:
        return local_BD
    everything: Tensor = _Gather.apply(local_BD.contiguous())
    return everything


def gathered_rows(local_B: Tensor) -> Tensor:
    """Concatenate every worker's integers (B,) to (W·B,), without gradients."""
    if world() == 1:
        return local_B
    parts = [torch.empty_like(local_B) for _ in range(world())]
    dist.all_gather(parts, local_B)
    return torch.cat(parts)


def mean(values: Tensor | float) -> Tensor:
    """Average numbers over all workers, in double precision, where they lie: NCCL knows no others."""
    total = torch.as_tensor(values).to(torch.float64, copy=True)
    if world() > 1:
        dist.all_reduce(total)
    return total / world()
