"""What runs on a GPU does what it does on a processor; skipped where there is none."""

import gc
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from tests.test_compiled import TEXTS, cosines, model
from tests.test_shards import make

from askew import artifacts
from askew.ann import Design, Effort, Index, Kind
from askew.compiled import CompiledEncoder
from askew.models import Model
from askew.segments import Plan
from askew.shards import Shard

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
DESIGN = Design(kind="ivf_flat", dim=32, lists=64)


def vectors(number: int, seed: int = 0) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Vectors around 64 places, which every seed has in common."""
    places, random = np.random.default_rng(99).normal(size=(64, 32)), np.random.default_rng(seed)
    return (places[random.integers(64, size=number)] + random.normal(size=(number, 32)) / 2).astype(np.float32)


def found_by(index: Index) -> float:
    """The share of the 10 best that a search of 4 lists finds."""
    _, rows = index.search(vectors(200, seed=1), 10, Effort(lists=4))
    best = np.argsort(-vectors(200, seed=1) @ vectors(20_000).T, axis=1)[:, :10]
    return float(np.mean([len(set(one) & set(other)) / 10 for one, other in zip(rows, best, strict=True)]))


def test_lists_learned_on_a_gpu_find_as_much_and_are_written_as_all_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = Index.trained(DESIGN, vectors(20_000))
    gc.collect()  # what it was learned with on the GPU may go
    learned.write(tmp_path / "empty.faiss")
    of_gpu = Index.read(tmp_path / "empty.faiss", DESIGN).copy()
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    of_processor = Index.trained(DESIGN, vectors(20_000))
    shares = []
    for index in (of_gpu, learned.copy(), of_processor):
        index.add(vectors(20_000))
        shares.append(found_by(index))
    assert shares[0] == shares[1] > 0.5
    assert shares[1] == pytest.approx(shares[2], abs=0.05)


@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_fp16", "ivf_sq8"])
def test_a_shard_on_a_gpu_answers_as_one_on_a_processor(tmp_path: Path, kind: Kind) -> None:
    ids = [f"i{number:05d}" for number in range(20_000)]
    design = DESIGN.model_copy(update={"kind": kind})
    plan = Plan.read(make(tmp_path, vectors(20_000), ids, [9_000], design, Effort(lists=8)))
    on_gpu, on_processor = Shard(plan, gpu=True), Shard(plan)
    assert all(part.index._gpu is not None for part in on_gpu._parts)
    for number in (1, 40):
        asked = vectors(number, seed=2)
        found, wanted = on_gpu.search(asked, 10), on_processor.search(asked, 10)
        np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-5)
        np.testing.assert_array_equal(found.rows, wanted.rows)


@pytest.mark.parametrize("bf16", [False, True])
def test_queries_and_items_have_the_vectors_that_they_have_on_a_processor(tmp_path: Path, bf16: bool) -> None:
    there = model(header=True)
    with artifacts.draft(tmp_path, "model", {}, {}) as draft:
        there.save(draft.folder)
        draft.details["dim"] = there.dim
    on_gpu = Model.load(artifacts.place(tmp_path, "model", artifacts.key("model", {}, {})), "cuda")
    encoder = CompiledEncoder(on_gpu, "bf16" if bf16 else "auto")
    for texts in (TEXTS[:1], TEXTS[:32], TEXTS):
        assert (cosines(encoder.queries(texts), there.queries(texts)) > 0.9999).all()
    photos = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    has_image = np.array([True, False, True, True, False])
    wanted = there.items(TEXTS[:5], photos, has_image)
    for name, found in on_gpu.items(TEXTS[:5], photos, has_image).items():
        np.testing.assert_allclose(found, wanted[name], atol=1e-3)
