import numpy as np
import torch
import torch.nn.functional as F

from askew.losses import info_nce


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
