"""Contrastive losses over query and item vectors.

Pure tensors: knows nothing of workers, towers or data.
Shapes: B queries of this worker, N items of all workers, K mined negatives a query, D dimensions.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    queries_BD: Tensor, items_ND: Tensor, target_B: Tensor, scale: Tensor, masked_BN: Tensor,
    weight_B: Tensor | None = None, log_q_N: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Mean InfoNCE: −log softmax of scale·⟨q, i⟩ at each query's target, over the items that are not masked.

    `masked_BN` marks false negatives (items known to be right for the query); a query's own target must not be
    masked. `weight_B` weighs queries by the grade of their positive (GCL: Marqo, arXiv 2404.08535), relative to
    the mean of all workers' weights: the mean of their losses is then the weighted mean. `log_q_N`, the logarithm
    of each item's chance to be in a batch, is taken off the logits: popular items, which are drawn often, would
    else be punished for it (Yi et al., RecSys 2019). With N = B and none of these it is `NCE` of Beyond Text and
    sentence-transformers' MultipleNegativesRankingLoss.
    """
    logits_BN = scale * queries_BD @ items_ND.T
    if log_q_N is not None:
        logits_BN = logits_BN - log_q_N
    losses_B = F.cross_entropy(logits_BN.masked_fill(masked_BN, -torch.inf), target_B, reduction="none")
    return losses_B.mean() if weight_B is None else (losses_B * weight_B).mean()


def hinge(
    queries_BD: Tensor, items_ND: Tensor, target_B: Tensor, margin: float, masked_BN: Tensor,
    weight_B: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Mean over queries of Σ max(0, margin − f⁺ + f⁻), items that are masked left out (DPSR: arXiv 2006.02282)."""
    scores_BN = queries_BD @ items_ND.T
    positive_B1 = scores_BN.gather(1, target_B[:, None])
    left_BN = ~masked_BN
    left_BN = left_BN.scatter(1, target_B[:, None], False)
    losses_B = ((margin - positive_B1 + scores_BN).clamp(min=0) * left_BN).sum(1)
    return losses_B.mean() if weight_B is None else (losses_B * weight_B).mean()


def triplet(
    queries_BD: Tensor, positives_BD: Tensor, negatives_BKD: Tensor, there_BK: Tensor, margin: float
) -> Tensor:
    """Mean of max(0, margin − f⁺ + f⁻) over the mined negatives that are there; 0 when none is."""
    positive_B1 = (queries_BD * positives_BD).sum(1, keepdim=True)
    negative_BK = torch.einsum("bd,bkd->bk", queries_BD, negatives_BKD)
    losses_BK = (margin - positive_B1 + negative_BK).clamp(min=0) * there_BK
    return losses_BK.sum() / there_BK.sum().clamp(min=1)


def matryoshka(
    loss: Callable[[Tensor, Tensor], Tensor], queries_BD: Tensor, items_ND: Tensor, dims: Sequence[int]
) -> Tensor:
    """Sum of a loss over the first d dimensions, normalised anew, for each d (arXiv 2205.13147)."""
    cut = ((F.normalize(queries_BD[:, :d], dim=1), F.normalize(items_ND[:, :d], dim=1)) for d in dims)
    return torch.stack([loss(queries, items) for queries, items in cut]).sum()
