"""Contrastive losses over query and item vectors.

Pure tensors: knows nothing of workers, towers or data.
Shapes: B queries of this worker, N items of all workers, D dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(queries_BD: Tensor, items_ND: Tensor, target_B: Tensor, scale: Tensor, masked_BN: Tensor) -> Tensor:
    """Mean InfoNCE: −log softmax of scale·⟨q, i⟩ at each query's target, over the items that are not masked.

    `masked_BN` marks false negatives (items known to be right for the query); a query's own target must
    not be masked. With N = B and no mask this is `NCE` of Beyond Text and sentence-transformers'
    MultipleNegativesRankingLoss. Returns a scalar.
    """
    logits_BN = (scale * queries_BD @ items_ND.T).masked_fill(masked_BN, -torch.inf)
    return F.cross_entropy(logits_BN, target_B)
