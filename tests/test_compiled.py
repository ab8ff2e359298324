"""The compiled query encoder gives the trained model's vectors, or none."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import test_towers
from tests.fakes import FakeSwitch, deployed, release, run

from askew import artifacts, compiled
from askew.compiled import CANARIES, CompiledEncoder
from askew.deployments import Encoder
from askew.errors import ArtifactError
from askew.inputs import Tokens
from askew.models import Model, Vectors
from askew.towers import TowerSettings, TwoTower

WORDS = ("red", "blue", "striped", "mug", "cap", "steel", "kettle")
TEXTS = [
    "mug", "red striped mug", "", "blue cap", "🎁", *(" ".join(WORDS[:n]) for n in range(1, 8)), 5 * "red mug ",
    *(f"{one} {other}" for one in WORDS for other in WORDS),
]  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "header": {"header": True},
    "deep": {"text": {"width": 64, "layers": 3, "heads": 4}},
    "first token": {"text": {"width": 16, "heads": 2, "pooling": "cls"}},
    "text alone": {"fusion": "text", "shared_text": True},
    "long queries": {"query_length": 100},
}
checkpoints = test_towers.saved


def model(**other: Any) -> Model:
    torch.manual_seed(0)
    tokens = Tokens.train(TEXTS * 3, 300)
    small = {"dim": 16, "text": {"width": 16, "heads": 2}, "image_size": 32, "query_length": 12}
    towers = TwoTower(TowerSettings.model_validate(small | other), tokens.size)
    if towers.settings.header:
        torch.nn.init.normal_(towers.header.weight)  # it begins with nought, and every gate would be the same
    return Model(towers, tokens)


def cosines(found: Vectors, wanted: Vectors) -> Vectors:
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    return (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)


def batches(size: int) -> Iterator[list[str]]:
    return (TEXTS[start : start + size] for start in range(0, len(TEXTS), size))


# --- the same vectors ----------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "near"), [("fp32", 0.999999), ("bf16", 0.999)])
@pytest.mark.parametrize("shape", SHAPES)
def test_batches_of_any_size_encode_as_the_model_does(shape: str, precision: Any, near: float) -> None:
    trained = model(**SHAPES[shape])
    encoder = CompiledEncoder(trained, precision)
    assert encoder.runtime == f"openvino {precision}"
    for size in (1, 2, 7, 32, len(TEXTS)):
        for texts in batches(size):
            assert (cosines(encoder.queries(texts), trained.queries(texts)) >= near).all(), texts


def test_more_tokens_than_a_block_holds_keep_their_order() -> None:
    trained = model()
    texts = 20 * TEXTS
    found = CompiledEncoder(trained, "fp32").queries(texts)
    assert np.allclose(found, trained.queries(texts), atol=1e-5)


def test_a_text_as_long_as_the_longest_block_and_longer() -> None:
    trained = model(query_length=100)
    texts = [" ".join((WORDS * 20)[:n]) for n in (1, 63, 64, 65, 99, 100, 130)]
    assert np.allclose(CompiledEncoder(trained, "fp32").queries(texts), trained.queries(texts), atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_query_alone_is_what_it_is_in_a_batch(precision: Any) -> None:
    encoder = CompiledEncoder(model(), precision)
    together, alone = encoder.queries(TEXTS), np.concatenate([encoder.queries([text]) for text in TEXTS])
    assert (cosines(together, alone) >= 0.9999).all()
    assert np.array_equal(together, encoder.queries(TEXTS))


def test_neither_padding_nor_what_was_asked_before_matters() -> None:
    encoder = CompiledEncoder(model(), "fp32")
    alone = encoder.queries(["mug"])
    for longest in (" ".join(WORDS[:n]) for n in range(1, 8)):
        assert np.allclose(encoder.queries(["mug", longest])[0], alone[0], atol=1e-6)
        encoder.queries([longest])
        assert np.array_equal(encoder.queries(["mug"]), alone)


def test_berts_are_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(compiled, "_Padded")
    assert CompiledEncoder(model(), "fp32").runtime == "openvino fp32"


def test_texts_do_not_see_each_other() -> None:
    encoder = CompiledEncoder(model(), "fp32")
    assert np.allclose(
        *(encoder.queries([other, "red mug"])[1] for other in ("blue cap", "steel kettle")), atol=1e-6
    )
    assert not np.allclose(*encoder.queries(["blue cap", "steel kettle"]), atol=1e-2)


def test_vectors_stay_as_they_were_given() -> None:
    encoder = CompiledEncoder(model())
    first = encoder.queries(["red mug"])
    kept = first.copy()
    encoder.queries(["blue cap"])
    assert np.array_equal(first, kept)


def test_no_queries_are_no_vectors() -> None:
    assert CompiledEncoder(model(header=True)).queries([]).shape == (0, 32)


@pytest.mark.parametrize("kind", ["bert", "clip", "siglip"])
def test_checkpoints_are_compiled_too(checkpoints: Path, kind: str) -> None:
    towers, tokens = test_towers.of_checkpoints(checkpoints, kind, "vit")
    trained = Model(towers, tokens)
    encoder = CompiledEncoder(trained, "fp32")
    assert encoder.runtime == "openvino fp32"
    for size in (1, 2, 32):
        for texts in batches(size):
            assert (cosines(encoder.queries(texts), trained.queries(texts)) >= 0.99999).all()


# --- held to the trained model -------------------------------------------------------------------


def turned(queries: torch.Tensor, gate: torch.Tensor, header: bool) -> torch.Tensor:
    return queries.flip(1)


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp32"])
def test_a_sabotaged_graph_is_refused(monkeypatch: pytest.MonkeyPatch, precision: Any) -> None:
    monkeypatch.setattr(compiled, "indexed_queries", turned)
    with pytest.raises(ArtifactError, match=r"within a cosine of 0\.999 .* found .* for 'mug'"):
        CompiledEncoder(model(), precision)


def test_a_replica_whose_encoder_differs_is_never_ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with artifacts.draft(tmp_path, "model", {}, {}) as draft:
        model().save(draft.folder)
    folder, threads = artifacts.place(tmp_path, "model", artifacts.key("model", {}, {})), torch.get_num_threads()
    try:
        switch = FakeSwitch(one := release(model=str(folder)))
        vectors = run(deployed(Encoder, switch, 0.02).encode(one.key, ["red mug", "cap"], []))
        assert torch.get_num_threads() == 1
        monkeypatch.setattr(compiled, "indexed_queries", turned)
        with pytest.raises(RuntimeError, match=r"was not loaded: .*within a cosine of 0\.999"):
            deployed(Encoder, FakeSwitch(one), 0.02)
    finally:
        torch.set_num_threads(threads)
    assert (cosines(vectors, model().queries(["red mug", "cap"])) >= 0.999).all()


@pytest.mark.parametrize("wrong", [0.9, np.nan])
@pytest.mark.parametrize("canary", CANARIES[::6])
def test_one_canary_is_enough(canary: str, wrong: float) -> None:
    trained = model()

    def encode(texts: Sequence[str]) -> Vectors:
        vectors = trained.queries(texts)
        for row in (n for n, text in enumerate(texts) if text == canary):
            vectors[row, 0] += wrong
        return vectors

    compiled.check(trained.queries, trained, "torch")
    with pytest.raises(ArtifactError, match=r"found (-?0\.\d+|nan) for "):
        compiled.check(encode, trained, "torch")


def test_queries_alone_are_compared_too() -> None:
    trained = model()
    with pytest.raises(ArtifactError, match="for 'mug'"):
        compiled.check(
            lambda texts: -trained.queries(texts) if len(texts) == 1 else trained.queries(texts), trained, ""
        )


@pytest.mark.parametrize(("able", "width", "tried"), [
    (["FP32", "BF16"], 256, ["bf16", "fp32"]), (["FP32", "BF16"], 128, ["fp32"]), (["FP32"], 256, ["fp32"]),
])  # fmt: skip
def test_bfloat16_is_for_wide_towers_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, able: list[str], width: int, tried: list[str]
) -> None:
    monkeypatch.setattr(compiled.openvino.Core, "get_property", lambda *_: able)
    trained = model(text={"width": width, "heads": 2})
    assert compiled._precisions(trained, "auto") == tried
    assert [compiled._precisions(trained, name) for name in ("bf16", "fp32")] == [["bf16"], ["fp32"]]


def test_bfloat16_that_misses_gives_way_to_float32(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = compiled.compiled

    def coarse(trained: Model, precision: str, threads: int) -> compiled.Encode:
        encode = real(trained, precision, threads)
        return encode if precision == "fp32" else lambda texts: np.sign(encode(texts))

    monkeypatch.setattr(compiled, "compiled", coarse)
    monkeypatch.setattr(compiled, "_precisions", lambda trained, precision: ["bf16", "fp32"])
    encoder = CompiledEncoder(model())
    assert encoder.runtime == "openvino fp32"
    assert "askew: warning: wanted a query encoder within" in capsys.readouterr().out


def test_what_does_not_compile_stays_in_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no such operation\nand more")

    monkeypatch.setattr(compiled, "_graph", refuse)
    trained = model()
    encoder = CompiledEncoder(trained, "bf16")
    assert encoder.runtime == "torch"
    assert np.array_equal(encoder.queries(TEXTS), trained.queries(TEXTS))
    assert encoder.queries([]).shape == (0, 16)
    assert "the query encoder stays in torch: RuntimeError: no such operation\n" in capsys.readouterr().out


def test_canaries_are_many_and_of_many_kinds() -> None:
    assert len(set(CANARIES)) == len(CANARIES) >= 32
    assert {len(text.split()) for text in CANARIES} >= {0, 1, 2, 3, 4, 5}
    assert sum(not text.isascii() for text in CANARIES) >= 8


# --- a good neighbour ----------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_a_graph_keeps_to_its_threads_and_to_no_core(threads: int) -> None:
    tower, ids = compiled._Tower(model().towers), torch.zeros(2, 3, dtype=torch.int64)
    made = compiled._request(compiled._graph(tower, ids, {}), "fp32", threads).get_compiled_model()
    assert made.get_property("INFERENCE_NUM_THREADS") == threads
    assert not made.get_property("ENABLE_CPU_PINNING")


def test_the_training_model_is_left_as_it_was() -> None:
    trained = model()
    before = trained.queries(TEXTS)
    CompiledEncoder(trained)
    assert np.array_equal(trained.queries(TEXTS), before)


def test_openvino_reports_to_nobody() -> None:
    assert sys.modules["openvino_telemetry"] is None
