"""BM25 over one text field: what a search by words alone finds, in this process's memory.

Terms are lower-cased and stemmed as English (tantivy's "en_stem"); a query is the OR of its terms, and
k1 = 1.2, b = 0.75. Document lengths are rounded to one byte, as in Lucene. Knows nothing of item ids.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import tantivy
from numpy.typing import NDArray

TEXT, ROW = "text", "row"
HEAP_BYTES = 512_000_000


class BM25:
    """A searchable copy of n texts, numbered 0 … n-1 in the order given."""

    def __init__(self, texts: Iterable[str]) -> None:
        words, step = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple()), tantivy.Filter
        for each in (step.remove_long(40), step.lowercase(), step.stemmer("english")):
            words = words.filter(each)
        self._words = words.build()
        builder = tantivy.SchemaBuilder()
        builder.add_text_field(TEXT, tokenizer_name="en_stem", index_option="freq")
        builder.add_unsigned_field(ROW, fast=True)
        self._schema = builder.build()
        self._searcher = self._index(texts)

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

    def _index(self, texts: Iterable[str]) -> tantivy.Searcher:
        index = tantivy.Index(self._schema)
        # One thread writes one segment while the heap lasts: a cut through equal scores then falls by row.
        writer = index.writer(heap_size=HEAP_BYTES, num_threads=1)
        for row, text in enumerate(texts):
            document = tantivy.Document()
            document.add_text(TEXT, text)
            document.add_unsigned(ROW, row)
            writer.add_document(document)
        writer.commit()
        writer.wait_merging_threads()
        index.reload()
        return index.searcher()

    def _one(self, query: str, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        terms = [tantivy.Query.term_query(self._schema, TEXT, word, "freq") for word in self._words.analyze(query)]
        anyone = tantivy.Query.boolean_query([(tantivy.Occur.Should, term) for term in terms])
        hits = self._searcher.search(anyone, limit=k, count=False).hits if terms else []
        rows = self._searcher.fast_field_values(ROW, [address for _, address in hits]) if hits else []
        return np.array(rows, dtype=np.int64), np.array([score for score, _ in hits], dtype=np.float32)
