"""Gradient caching: a batch of any size trains in the memory of a small one.

A contrastive loss needs the vectors of the whole batch, not its activations. So the batch is encoded in pieces
without keeping any; the loss gives each vector its gradient; then each piece is encoded again and that gradient
carried on into the weights (Gao et al., "Scaling deep contrastive learning batch size under memory limited
setup", RepL4NLP 2021). The gradients are those of one pass over the whole batch, as long as encoding a piece
does not depend on the others (no batch normalisation) and is the same twice (it is seeded).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from askew.towers import Encoded, Items

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # queries, and the titles, pixels and has_image of items
T = TypeVar("T")


def backward(
    model: nn.Module, inputs: Inputs, loss_of: Callable[[Encoded], tuple[Tensor, T]], at_once: int, seed: int,
    forward: Callable[..., Encoded] | None = None,
) -> tuple[Tensor, T]:  # fmt: skip
    """Compute a loss and the gradients of all weights, encoding at most `at_once` items at a time.

    `loss_of` is given the encoded batch, and returns a scalar and whatever else is to be told. `model` may be
    wrapped in DistributedDataParallel, which then averages gradients once.
    """
    forward = forward or model
    pieces = list(_pieces(inputs, at_once))
    if len(pieces) == 1:
        loss, told = loss_of(_encoded(forward, inputs, seed, 0))
        loss.backward()
        return loss.detach(), told
    with torch.no_grad():
        parts = [_encoded(forward, piece, seed, number) for number, piece in enumerate(pieces)]
    leaves = [leaf.detach().requires_grad_() for leaf in _joined(parts)]
    loss, told = loss_of(_as_encoded(leaves, parts[0]))
    loss.backward()
    at = [0] * len(leaves)
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        waiting = getattr(model, "no_sync", contextlib.nullcontext)
        with contextlib.nullcontext() if last else waiting():
            flat = _flat(_encoded(forward, piece, seed, number))
            total = flat[-1] * (_gradient(leaves[-1]) if last else 0.0)  # the scale is one for all pieces
            for place, part in enumerate(flat[:-1]):
                here = slice(at[place], at[place] + len(part))
                total = total + (part * _gradient(leaves[place])[here]).sum()
                at[place] = here.stop
            total.backward()
    return loss.detach(), told


def _pieces(inputs: Inputs, at_once: int) -> Iterator[Inputs]:
    """Cut items into pieces of at most `at_once`, and queries into as many."""
    queries, items = inputs[0], inputs[1:]
    count = max(1, -(-len(items[0]) // at_once))
    cut = [torch.tensor_split(part, count) for part in (queries, *items)]
    yield from zip(*cut, strict=True)


def _encoded(forward: Callable[..., Encoded], piece: Inputs, seed: int, number: int) -> Encoded:
    """Encode a piece by random numbers of its own (dropout), the same each time."""
    torch.manual_seed((seed * 1_000_003 + number) % 2**63)
    return forward(*piece)


def _flat(encoded: Encoded) -> list[Tensor]:
    items = [part for part in encoded.items if part is not None]
    return [encoded.queries_BD, encoded.gate_B, *items, encoded.scale]


def _joined(parts: Sequence[Encoded]) -> list[Tensor]:
    columns = list(zip(*map(_flat, parts), strict=True))
    return [*(torch.cat(column) for column in columns[:-1]), columns[-1][0]]


def _as_encoded(flat: Sequence[Tensor], like: Encoded) -> Encoded:
    queries, gate, *items, scale = flat
    left = iter(items)
    return Encoded(queries, gate, Items(*(None if part is None else next(left) for part in like.items)), scale)  # type: ignore[arg-type]


def _gradient(leaf: Tensor) -> Tensor:
    return leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
