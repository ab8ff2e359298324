"""BM25 over one text field: what a search by words alone finds, in memory or from a folder.

Terms are lower-cased and stemmed as English (tantivy's "en_stem"); a query is the OR of its terms, and
k1 = 1.2, b = 0.75. Document lengths are rounded to one byte, as in Lucene. Knows nothing of item ids.
"""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tantivy
from numpy.typing import NDArray

TEXT, ROW = "text", "row"
HEAP_BYTES = 512_000_000


class BM25:
    """A searchable copy of n texts, numbered 0 … n-1 in the order given."""

    def __init__(self, texts: Iterable[str | tuple[int, str]], folder: Path | None = None) -> None:
        """Index texts, each numbered in the order given or, as a tuple, by its own number.

        With `folder`, the index is written there, for `open`; without, it is in memory.
        """
        self._analyse()
        index = self._made(folder)
        # One thread writes one segment while the heap lasts: a cut through equal scores then falls by row.
        writer = index.writer(heap_size=HEAP_BYTES, num_threads=1)
        for place, each in enumerate(texts):
            row, text = each if isinstance(each, tuple) else (place, each)
            document = tantivy.Document()
            document.add_text(TEXT, text)
            document.add_unsigned(ROW, row)
            writer.add_document(document)
        writer.commit()
        writer.wait_merging_threads()
        self._search_in(index)

    @classmethod
    def open(cls, folder: Path) -> "BM25":
        """Open an index that was written."""
        bm25 = cls.__new__(cls)
        bm25._analyse()
        bm25._search_in(tantivy.Index.open(str(folder)))
        return bm25

    def _analyse(self) -> None:
        words, step = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple()), tantivy.Filter
        for each in (step.remove_long(40), step.lowercase(), step.stemmer("english")):
            words = words.filter(each)
        self._words = words.build()
        builder = tantivy.SchemaBuilder()
        builder.add_text_field(TEXT, tokenizer_name="en_stem", index_option="freq")
        builder.add_unsigned_field(ROW, fast=True)
        self._schema = builder.build()

    def _made(self, folder: Path | None) -> tantivy.Index:
        if folder is None:
            return tantivy.Index(self._schema)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return tantivy.Index(self._schema, path=str(folder))

    def _search_in(self, index: tantivy.Index) -> None:
        index.reload()
        self._searcher = index.searcher()

    def search(self, queries: Sequence[str], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Find the k best texts of each query, however it is written: no character has a meaning of its own.

        Returns rows (q, k), best first, equal scores by row, padded with -1; and scores (q, k), padded
        with -inf.
        """
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        for number, query in enumerate(queries):
            found, score = self._one(query, k)
            order = np.lexsort((found, -score))
            rows[number, : len(found)], scores[number, : len(found)] = found[order], score[order]
        return rows, scores

    def _one(self, query: str, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        terms = [tantivy.Query.term_query(self._schema, TEXT, word, "freq") for word in self._words.analyze(query)]
        anyone = tantivy.Query.boolean_query([(tantivy.Occur.Should, term) for term in terms])
        hits = self._searcher.search(anyone, limit=k, count=False).hits if terms else []
        rows = self._searcher.fast_field_values(ROW, [address for _, address in hits]) if hits else []
        return np.array(rows, dtype=np.int64), np.array([score for score, _ in hits], dtype=np.float32)
