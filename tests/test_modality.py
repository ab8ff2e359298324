"""What text and photo bring, by a model whose scores are known."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from askew import modality
from askew.modality import Vectors


class Known:
    """An item's vector has its text's length, its photo's mean and their product."""

    def __init__(self, header: bool = False) -> None:
        self.header = header

    def items(
        self, texts: Sequence[str], pixels: NDArray[np.uint8], has_image: NDArray[np.bool_]
    ) -> dict[str, Vectors]:
        text = np.array([len(t) for t in texts], np.float32)
        image = pixels.mean(axis=(1, 2, 3)).astype(np.float32) * has_image
        whole = np.stack([text, image, text * image, np.ones_like(text)], axis=1)
        return {"text": whole * [1, 0, 0, 1], "image": whole * [0, 1, 0, 1], "fused": whole, "index": 2 * whole}


TEXTS = ["", "mug", "lamp"]
PIXELS = np.stack([np.full((2, 2, 3), value, np.uint8) for value in (7, 5, 2)])
THERE = np.array([True, True, False])


def test_items_are_encoded_with_their_own_another_s_and_no_photo() -> None:
    others = PIXELS[::-1], THERE[::-1]
    found = modality.ways(Known(), TEXTS, (PIXELS, THERE), others)
    assert set(found) == {"text", "image", "fused", "shuffled", "missing"}
    assert found["shuffled"][:, 1].tolist() == [0, 10, 14]
    assert found["missing"].tolist() == [[0, 0, 0, 2], [6, 0, 0, 2], [8, 0, 0, 2]]
    assert set(modality.ways(Known(), TEXTS, (PIXELS, THERE), None)) == {"text", "image", "fused"}
    adaptive = modality.ways(Known(header=True), TEXTS, (PIXELS, THERE), None)["adaptive"]
    assert (adaptive == 2 * found["fused"]).all()


def test_shares_add_up_and_halve_what_both_bring_together() -> None:
    query = np.array([1, 10, 100, 1000], np.float32)
    scores = {name: (v @ query)[None] for name, v in modality.lacking(Known(), TEXTS, (PIXELS, THERE)).items()}
    found = modality.shares(scores)
    assert sum(found)[0].tolist() == pytest.approx(scores["whole"][0].tolist())
    assert found.neither.tolist() == [[2000, 2000, 2000]]
    assert found.text[0].tolist() == pytest.approx([0, 2 * 3 + 100 * 15, 8])
    assert found.image[0].tolist() == pytest.approx([140, 100 + 100 * 15, 0])
