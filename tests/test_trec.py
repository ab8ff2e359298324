"""TREC's files: what is written is read back, and what cannot be scored is refused with its line."""

from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from askew import trec
from askew.errors import DataError
from askew.metrics import Run, score

LINES = ["q1 Q0 b 1 0.5 x", "q1 Q0 a 2 0.5 x", "q1 Q0 c 3 0.9 x", "q2 Q0 a 1 1e-3 x"]


def written(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_run_stands_by_scores_and_then_by_item_id_whatever_its_ranks(tmp_path: Path) -> None:
    run = trec.read_run(written(tmp_path / "run", LINES))
    assert [run.ranking(number) for number in range(2)] == [["c", "a", "b"], ["a"]]
    assert list(run.query_ids) == ["q1", "q2"]


def test_scores_that_32_bits_cannot_tell_apart_keep_their_order(tmp_path: Path) -> None:
    run = trec.read_run(written(tmp_path / "run", ["q Q0 a 1 1000000.01 x", "q Q0 b 2 1000000.02 x"]))
    assert run.ranking(0) == ["b", "a"]


def test_rows_count_in_the_items_that_are_given(tmp_path: Path) -> None:
    run = trec.read_run(written(tmp_path / "run", LINES), ["a", "b", "bb", "c"])
    assert run.rows.tolist() == [[3, 0, 1], [0, -1, -1]]
    with pytest.raises(DataError, match=r"items of the catalogue.*'b' of query 'q1' in line 1"):
        trec.read_run(tmp_path / "run", ["a", "c"])


def test_other_queries_may_have_found_other_items(tmp_path: Path) -> None:
    run = trec.read_run(written(tmp_path / "run", LINES), ["a"], ["q2", "q3"])
    assert (run.query_ids, run.rows.tolist()) == (["q2"], [[0]])
    with pytest.raises(DataError, match="in line 3"):
        trec.read_run(tmp_path / "run", ["a", "b"], ["q1"])
    assert trec.read_run(tmp_path / "run", ["a"], ["q3"]).query_ids == []


def test_what_is_written_is_read_back_and_scored_alike(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    ids = [f"i{n}" for n in range(30)]
    rows = np.stack([random.permutation(30)[:12] for _ in range(6)])
    rows[2, 5:] = -1
    scores = -np.sort(-random.random((6, 12)).astype(np.float32), axis=1)
    scores[0, 3] = scores[0, 2]
    whole = Run([f"q{n}" for n in range(6)], ids, rows, scores)
    halves = [Run(whole.query_ids[part], ids, rows[part], scores[part]) for part in (slice(0, 2), slice(2, 6))]
    trec.write_run(tmp_path / "run", halves, "ours")
    again = trec.read_run(tmp_path / "run")
    assert [again.ranking(n) for n in range(6)] == [whole.ranking(n) for n in range(6)]
    qrels = {f"q{n}": {str(i): int(random.integers(0, 3)) for i in random.choice(ids, 9)} for n in range(6)}
    trec.write_qrels(tmp_path / "qrels", qrels)
    assert trec.read_qrels(tmp_path / "qrels") == qrels
    ours = score(qrels, whole, min_relevant=1)
    theirs = ir_measures.iter_calc(
        [ir_measures.nDCG @ 10],
        ir_measures.read_trec_qrels(str(tmp_path / "qrels")),
        ir_measures.read_trec_run(str(tmp_path / "run")),
    )
    found = {one.query_id: one.value for one in theirs}
    untied = [n for n, q in enumerate(ours.query_ids) if q != "q0"]
    for n in untied:
        assert found[ours.query_ids[n]] == pytest.approx(ours.values["nDCG@10"][n])


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["q Q0 a 1 nan x"], "finite numbers.*'nan' of query 'q' in line 1"),
        (["q Q0 a 1 inf x"], "finite numbers"),
        (["q Q0 a 1 high x"], "finite numbers"),
        ([*LINES, "q1 Q0 b 4 0.1 x"], "once for a query.*'b' of query 'q1' in line 5"),
        ([*LINES, "q1 Q0 b 4 0.1"], "6 columns.*line 5"),
        (["q Q0 a 1 1 x y"], "6 columns"),
        (["q Q0 a 1 1 x", "q Q0 a 1 1 x y z"], "line 2"),
        ([""], "empty"),
    ],
    ids=["nan", "infinite", "word", "twice", "short", "long", "longer", "empty"],
)
def test_a_run_that_cannot_be_scored_is_refused(tmp_path: Path, lines: list[str], says: str) -> None:
    with pytest.raises(DataError, match=says):
        trec.read_run(written(tmp_path / "run", lines))


@pytest.mark.parametrize(
    ("line", "says"),
    [("q 0 a 1.5", "whole numbers"), ("q 0 a high", "whole numbers"), ("q 0 a", "4 columns"), ("q 0 b 2", "once")],
)
def test_judgments_that_cannot_be_used_are_refused(tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        trec.read_qrels(written(tmp_path / "qrels", ["q 0 b 1", line]))


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found none"):
        trec.read_run(tmp_path / "none")
    (tmp_path / "run").write_bytes(b"q Q0 \xff 1 1 x\n")
    with pytest.raises(DataError, match="utf-8"):
        trec.read_run(tmp_path / "run")


@pytest.mark.parametrize("read", [trec.read_run, trec.read_qrels])
@given(st.lists(st.text(st.sampled_from('q0ia1.5e\0"#é \t\r\u2028')).map(str.encode) | st.binary(max_size=20)))
@example([b"q 0 i 1 x y z more"])
def test_any_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, read: Any, lines: list[bytes]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(b"\n".join(lines))
    try:
        found = read(path)
    except DataError:
        return
    assert len(found if isinstance(found, dict) else found.query_ids)


IDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zs", "Zl", "Zp"]), min_size=1, max_size=5)
JUDGED = st.dictionaries(IDS, st.dictionaries(IDS, st.integers(-3, 2**40), min_size=1, max_size=4), min_size=1)


@given(JUDGED)
def test_any_judgments_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, qrels: dict[str, dict[str, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "judged"
    trec.write_qrels(path, qrels)
    assert trec.read_qrels(path) == qrels
