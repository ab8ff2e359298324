import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from torch import nn

from askew.losses import info_nce, matryoshka


def test_info_nce_is_the_formula_written_out() -> None:
    torch.manual_seed(0)
    queries, items = F.normalize(torch.randn(3, 5)), F.normalize(torch.randn(6, 5))
    masked = torch.zeros(3, 6, dtype=torch.bool)
    masked[0, 4] = masked[2, 0] = True
    loss = info_nce(queries, items, torch.tensor([0, 1, 2]), torch.tensor(10.0), masked)
    q, i = queries.numpy().astype(float), items.numpy().astype(float)
    by_hand = [
        -np.log(np.exp(10 * q[b] @ i[b]) / sum(np.exp(10 * q[b] @ i[n]) for n in range(6) if not masked[b, n]))
        for b in range(3)
    ]
    assert np.isclose(loss.item(), np.mean(by_hand), atol=1e-5)


def test_a_masked_item_gets_no_gradient() -> None:
    items = torch.randn(3, 4, requires_grad=True)
    masked = torch.tensor([[False, False, True]])
    info_nce(torch.randn(1, 4), items, torch.tensor([0]), torch.tensor(1.0), masked).backward()
    assert items.grad is not None
    assert (items.grad[2] == 0).all()
    assert (items.grad[1] != 0).any()


# --- beside sentence-transformers, on the same vectors -------------------------------------------


class Given(nn.Module):
    """A model of sentence-transformers that gives vectors as it got them."""

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": features["vectors"]}


@pytest.fixture
def vectors() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randn(6, 16, requires_grad=True), torch.randn(10, 16, requires_grad=True)


def theirs(queries: torch.Tensor, items: torch.Tensor, dims: list[int] | None = None) -> torch.Tensor:
    """Its ranking loss of queries whose positives are the first items, at a scale of 20."""
    model = SentenceTransformer(modules=[Given()], device="cpu")
    loss: nn.Module = MultipleNegativesRankingLoss(model, scale=20.0)
    if dims:
        loss = MatryoshkaLoss(model, loss, dims)
    others = [{"vectors": row.expand(len(queries), -1)} for row in items[len(queries) :]]
    features = [{"vectors": queries}, {"vectors": items[: len(queries)]}, *others]
    value: torch.Tensor = loss(features, torch.empty(0))
    return value


def alike(ours: torch.Tensor, wanted: torch.Tensor, *leaves: torch.Tensor) -> None:
    """Compare losses, and their gradients through the towers' normalisation, which is its own too."""
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    for mine, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


NO_MASK, SCALE = torch.zeros(6, 6, dtype=torch.bool), torch.tensor(20.0)


def test_info_nce_is_its_ranking_loss(vectors: tuple[torch.Tensor, torch.Tensor]) -> None:
    queries, items = vectors
    ours = info_nce(F.normalize(queries), F.normalize(items[:6]), torch.arange(6), SCALE, NO_MASK)
    alike(ours, theirs(queries, items[:6]), queries, items)


def test_graded_pairs_are_its_losses_weighed(vectors: tuple[torch.Tensor, torch.Tensor]) -> None:
    """GCL is the mean of each query's own loss, weighed by its grade: each is asked of it alone."""
    queries, items = vectors
    weights = torch.tensor([1.0, 0.5, 0.25, 1.0, 0.75, 0.1])
    masked, target = torch.zeros(6, 10, dtype=torch.bool), torch.arange(6)
    ours = info_nce(F.normalize(queries), F.normalize(items), target, SCALE, masked, weights / weights.mean())
    order = [[n, *(m for m in range(10) if m != n)] for n in range(6)]
    alone = torch.stack([theirs(queries[n : n + 1], items[order[n]]) for n in range(6)])
    alike(ours, (weights * alone).sum() / weights.sum(), queries, items)


def test_matryoshka_is_its_matryoshka(vectors: tuple[torch.Tensor, torch.Tensor]) -> None:
    queries, items = vectors
    target = torch.arange(6)

    def loss(q: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return info_nce(q, i, target, SCALE, NO_MASK)

    normal = F.normalize(queries), F.normalize(items[:6])
    ours = loss(*normal) + matryoshka(loss, *normal, [8, 4])
    alike(ours, theirs(queries, items[:6], [16, 8, 4]), queries, items)
