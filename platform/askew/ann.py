"""Indexes of vectors by FAISS: the kinds there are, and how one is trained, filled, joined and searched.

Inner product throughout. Vectors are numbered from nought in the order in which they are added, and indexes that
were made from one `trained` are joined as if all had been added to one. Knows nothing of items, segments or files'
places.
Shapes: B queries, N vectors, D dimensions, K hits.
"""

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from askew.config import Settings
from askew.errors import ArtifactError

if TYPE_CHECKING:
    from askew.rough import Rough

faiss: Any = _faiss  # its stubs are of an older version

Kind = Literal["flat", "ivf_flat", "ivf_fp16", "ivf_sq8", "ivf_pq", "ivf_rabitq", "hnsw"]
Refine = Literal["none", "sq8", "fp16", "fp32"]
Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]

REFINED = ("ivf_pq", "ivf_rabitq")  # kinds whose codes are so short that their best are scored again
AGAIN = (100, 150, 200, 300, 400, 600, 800, 1600)  # of their best that are tried
BYTES = {"sq8": 1, "fp16": 2, "fp32": 4}  # of a dimension
REFINES = {"sq8": "SQ8", "fp16": "SQfp16", "fp32": "Flat"}
TYPES = {"ivf_fp16": "QT_fp16", "ivf_sq8": "QT_8bit"}  # of the numbers that vectors are kept in
CLASSES = {
    "flat": "IndexFlat", "ivf_flat": "IndexIVFFlat", **dict.fromkeys(TYPES, "IndexIVFScalarQuantizer"),
    "ivf_pq": "IndexIVFPQFastScan", "ivf_rabitq": "IndexIVFRaBitQFastScan", "hnsw": "IndexHNSWFlat",
}  # fmt: skip
NEIGHBOURS = 32  # of HNSW
BITS = 2  # of a dimension in RaBitQ: with one, four times as many must be scored again
TRAINED_ON = 64  # vectors for each list, where there are as many
ROUGH_FROM = 1 << 16  # vectors: products in bfloat16 first tell which are worth an exact score
BLAS_FROM_BATCH = 8  # FAISS 1.15 scans row by row below a threshold that counts queries × dimensions
ON_GPU = ("flat", "ivf_flat", *TYPES)  # kinds that FAISS searches on a GPU too,
GPU_K, GPU_LISTS = 2048, 2048  # up to so many hits and lists
MAX_LOOPS = 1 << 28  # of a file that is read: its checksum was right, and yet it should not take for ever
SCORED_AT_ONCE = 1 << 22  # numbers
_READING = threading.Lock()
SPARE, ROUNDING = 8, 1e-5  # a batch's matrix product rounds equal vectors apart, by their places


class Design(Settings):
    """What kind of index it is. Bytes an item and the kinds' names: docs/index.md."""

    kind: Kind
    dim: int = Field(ge=1)
    lists: int = Field(default=0, ge=0)  # of an inverted file; 0 for other kinds
    refine: Refine = "none"  # the precision in which the best of short codes are scored again

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind.startswith("ivf") != bool(self.lists):
            raise ValueError(f"lists={self.lists} does not fit {self.kind}")
        if (self.refine != "none") and self.kind not in REFINED:
            raise ValueError(f"{self.kind} is not refined: its own codes are long")
        if self.kind == "ivf_pq" and self.dim % 2:
            raise ValueError(f"ivf_pq takes an even number of dimensions, not {self.dim}")
        return self

    @property
    def factory(self) -> str:
        """The string of faiss.index_factory."""
        codes = {
            "flat": "Flat", "ivf_flat": "Flat", "ivf_fp16": "SQfp16", "ivf_sq8": "SQ8",
            "ivf_pq": f"PQ{self.dim // 2}x4fs", "ivf_rabitq": f"RaBitQfs{BITS}", "hnsw": f"HNSW{NEIGHBOURS}",
        }[self.kind]  # fmt: skip
        refined = "" if self.refine == "none" else f",Refine({REFINES[self.refine]})"
        return (f"IVF{self.lists}," if self.lists else "") + codes + refined

    @property
    def item_bytes(self) -> float:
        """Bytes that an item takes in memory, without the centroids."""
        code = {
            "flat": 4 * self.dim, "ivf_flat": 4 * self.dim, "ivf_fp16": 2 * self.dim, "ivf_sq8": self.dim,
            "ivf_pq": self.dim / 4, "ivf_rabitq": BITS * self.dim / 8 + 20,
            "hnsw": 4 * self.dim + 4 * 2 * NEIGHBOURS + 16,
        }[self.kind]  # fmt: skip
        number = 8 if self.lists else 0
        return code + number + (0 if self.refine == "none" else BYTES[self.refine] * self.dim)

    @property
    def served_bytes(self) -> float:
        """Bytes that an item takes when it is searched: exact search keeps vectors in half precision too."""
        return self.item_bytes + (2 * self.dim if self.exact else 0)

    @property
    def exact(self) -> bool:
        """Whether every vector is looked at, in full."""
        return self.kind == "flat"


class Effort(Settings):
    """How hard a search looks: what recall is bought with."""

    lists: int = Field(default=0, ge=0)  # inverted lists that are looked into
    again: int = Field(default=0, ge=0)  # so many of the best by short codes are scored again, or as many as hits
    breadth: int = Field(default=0, ge=0)  # candidates that HNSW keeps

    def wider(self, factor: float, design: Design) -> "Effort":
        """The same for a search of which only one in `factor` vectors counts."""
        return self.model_copy(update={
            "lists": min(design.lists, int(np.ceil(self.lists * factor))),
            "breadth": int(np.ceil(self.breadth * factor)),
        })  # fmt: skip

    def of_share(self, share: float) -> "Effort":
        """The same for a part that holds this share of all vectors, at random: it holds so many of the best.

        Two standard deviations more are scored again than are expected there.
        """
        again = self.again * share + 2 * (self.again * share * (1 - share)) ** 0.5
        return self.model_copy(update={"again": int(np.ceil(again))})


def _expect(design: Design, size: int) -> None:
    """Load what an exact search of many vectors wants now, and not during one: torch comes with it."""
    if design.exact and size >= ROUGH_FROM:
        importlib.import_module("askew.rough")


class Index:
    """A FAISS index of one design."""

    def __init__(self, design: Design, index: Any) -> None:
        self.design, self._index = design, index
        self._gpu: Any = None
        self._rough: Rough | None = None
        if design.kind in REFINED:  # query by query: few of a batch look into the same of many lists
            faiss.downcast_index(faiss.extract_index_ivf(index)).implem = 10
        faiss.cvar.distance_compute_blas_threshold = BLAS_FROM_BATCH * design.dim

    @property
    def size(self) -> int:
        """Number of vectors."""
        return int(self._index.ntotal)

    @classmethod
    def trained(cls, design: Design, sample: Vectors, seed: int = 0) -> "Index":
        """Make an empty index, its centroids and codes learned from a sample (N, D), on GPUs where there are."""
        index = faiss.index_factory(design.dim, design.factory, faiss.METRIC_INNER_PRODUCT)
        if design.lists:
            ivf = faiss.extract_index_ivf(index)
            ivf.cp.seed = seed
            ivf.cp.min_points_per_centroid = 1  # a small catalogue has few, and a warning helps nobody
            ivf.cp.max_points_per_centroid = TRAINED_ON
            if faiss.get_num_gpus():
                ivf.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(design.dim))
        index.train(_floats(sample))
        return cls(design, index)

    @classmethod
    def flat(cls, dim: int) -> "Index":
        """Make an empty index that is searched exactly."""
        return cls.trained(Design(kind="flat", dim=dim), np.empty((0, dim), dtype=np.float32))

    @classmethod
    def read(cls, path: Path, design: Design) -> "Index":
        """Read an index file. Raises ArtifactError when it is none, or of another design."""
        do = "build the index again"
        try:
            with _bounded(path, design):
                index = faiss.read_index(str(path))
        except (RuntimeError, MemoryError, OSError) as error:
            raise ArtifactError(f"a FAISS index in {path}", " ".join(str(error).split())[:200], do) from error
        if index.d != design.dim or index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ArtifactError(
                f"inner product over {design.dim} dimensions in {path}", f"{index.d} dimensions", do
            )
        body = faiss.downcast_index(index.base_index) if hasattr(index, "refine_index") else index
        if not _is(body, design.kind):
            raise ArtifactError(f"{design.factory} in {path}", type(body).__name__, do)
        _expect(design, int(index.ntotal))
        return cls(design, index)

    def write(self, path: Path) -> None:
        """Write the index as a file that FAISS opens."""
        faiss.write_index(self._index, str(path))

    def copy(self) -> "Index":
        """Copy an index."""
        return Index(self.design, faiss.clone_index(self._index))

    def add(self, vectors: Vectors) -> None:
        """Add (N, D) vectors."""
        self._rough = None
        self._index.add(_floats(vectors))

    def join(self, other: "Index") -> None:
        """Take over another index's vectors, which follow one's own; the other is left empty.

        Both come from one `trained`. Of graphs there is no joining.
        """
        assert self.design == other.design
        assert self.design.kind != "hnsw"
        mine, theirs = self._index, other._index
        self._rough = other._rough = None
        _expect(self.design, self.size + other.size)
        if self.design.refine == "none":
            mine.merge_from(theirs, mine.ntotal if self.design.lists else 0)
            return
        ours, codes = faiss.downcast_index(mine.base_index), faiss.downcast_index(theirs.base_index)
        ours.merge_from(codes, ours.ntotal)
        faiss.downcast_index(mine.refine_index).merge_from(faiss.downcast_index(theirs.refine_index), 0)
        mine.ntotal, theirs.ntotal = ours.ntotal, 0

    def accelerate(self) -> bool:
        """Copy the index to a GPU if this process sees one and it has the kind; tells whether it did.

        Searches without a mask are done there from then on; what is added later is not seen by them.
        """
        if self.design.kind in ON_GPU and faiss.get_num_gpus():
            self._resources = faiss.StandardGpuResources()
            self._gpu = faiss.index_cpu_to_gpu(self._resources, 0, self._index)
        return self._gpu is not None

    def _searcher(self, k: int, effort: Effort, mask: Mask | None) -> Any:
        """The index that such a search is done in."""
        fits = mask is None and k <= GPU_K and effort.lists <= GPU_LISTS
        return self._gpu if self._gpu is not None and fits else self._index

    def search(self, queries: Vectors, k: int, effort: Effort, mask: Mask | None = None) -> tuple[Vectors, Rows]:
        """Find up to k vectors for (B, D) queries, of those alone where the mask (N,) is true if one is given.

        Returns scores (B, K) descending and rows (B, K); where there are fewer, -inf and -1. An exact index
        breaks ties strictly: all vectors whose score equals that of the last hit are looked at, and of
        equal scores the lesser rows stand first.
        """
        if self.design.exact:
            return self._exact(queries, k, effort, mask)
        if not (k := min(k, self.size)):
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        params = self._params(k, effort, _Selector(mask))
        scores, rows = self._searcher(k, effort, mask).search(queries, k, params=params)
        if (rows[:, -1] < 0).any():
            scores[rows < 0] = -np.inf
        return scores, rows

    def _params(self, k: int, effort: Effort, selector: "_Selector") -> Any:
        if self.design.kind == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=max(effort.breadth, 16), **selector.argument)
        if not self.design.lists:
            return faiss.SearchParameters(**selector.argument)
        params = self._coarse(effort, selector)
        if self.design.refine == "none":
            return params
        again = min(max(effort.again, k), self.size)
        return faiss.IndexRefineSearchParameters(k_factor=again / k, base_index_params=params)

    def probe(self, queries: Vectors, effort: Effort) -> None:
        """Do to an empty index what a search does before it looks at vectors: find the lists, make the tables."""
        if self.design.lists:
            faiss.extract_index_ivf(self._index).search(queries, 1, params=self._coarse(effort, _Selector(None)))

    def candidates(self, queries: Vectors, effort: Effort) -> tuple[Vectors, Rows]:
        """Find those that a search of this effort scores again: their scores by short codes, (B, M), and rows."""
        k = max(1, min(effort.again, self.size))
        ivf = faiss.extract_index_ivf(self._index)
        found: tuple[Vectors, Rows] = ivf.search(queries, k, params=self._coarse(effort, _Selector(None)))
        return found

    def _coarse(self, effort: Effort, selector: "_Selector") -> Any:
        return faiss.SearchParametersIVF(nprobe=max(effort.lists, 1), **selector.argument)

    def _exact(self, queries: Vectors, k: int, effort: Effort, mask: Mask | None) -> tuple[Vectors, Rows]:
        selector = _Selector(mask)
        params = faiss.SearchParameters(**selector.argument) if selector.argument else None

        def best(depth: int) -> tuple[Vectors, Rows]:
            if params is None and self._gpu is None and (roughly := self._roughly(queries, depth)):
                return roughly
            found: tuple[Vectors, Rows] = self._searcher(depth, effort, mask).search(queries, depth, params=params)
            return found

        return self._strictly(queries, k, self.size if mask is None else int(mask.sum()), best)

    def _roughly(self, queries: Vectors, k: int) -> tuple[Vectors, Rows] | None:
        """Find the k best of many vectors for many queries, by rough scores first; None where that is no help."""
        if len(queries) < BLAS_FROM_BATCH or self.size < ROUGH_FROM:
            return None
        from askew import rough  # torch comes with it, which few shards want

        if not rough.fast():
            return None
        vectors = faiss.rev_swig_ptr(self._index.get_xb(), self.size * self.design.dim).reshape(self.size, -1)
        self._rough = self._rough or rough.Rough(vectors)
        if (pairs := self._rough.among_best(queries, k)) is None:
            return None
        number, row = pairs
        scores = np.einsum("nd,nd->n", vectors[row], queries[number])
        order = np.lexsort((-scores, number))
        firsts = np.searchsorted(number, np.arange(len(queries)))[:, None] + np.arange(k)
        return scores[order][firsts], row[order][firsts]

    def among(self, queries: Vectors, k: int, rows: Rows) -> tuple[Vectors, Rows]:
        """Find the k best of some rows (N,) by scoring them all, ties broken strictly as `search` says."""
        vectors = self.vectors(rows)

        def best(depth: int) -> tuple[Vectors, Rows]:
            scores, places = exact(vectors, queries, depth)
            return scores, rows[places]

        return self._strictly(queries, k, len(rows), best)

    def _strictly(
        self, queries: Vectors, k: int, there: int, best: Callable[[int], tuple[Vectors, Rows]]
    ) -> tuple[Vectors, Rows]:
        """Look as deep as scores may equal the k-th, then score anew what was found."""
        k = min(k, there)
        depth = min(k + SPARE, there)
        while True:
            scores, rows = best(depth)
            slack = ROUNDING * np.abs(scores[:, [0, k - 1]]).max(axis=1)
            if depth == there or (scores[:, depth - 1] < scores[:, k - 1] - slack).all():
                break
            depth = min(4 * depth, there)
        scores = self.scores(queries, rows)
        order = np.lexsort((rows, -scores), axis=1)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

    def scores(self, queries: Vectors, rows: Rows) -> Vectors:
        """Score rows (B, K) for queries (B, D) from the vectors as they are stored, alike wherever they stand."""
        wanted, place = np.unique(rows, return_inverse=True)
        vectors, place = self.vectors(wanted).astype(np.float64), place.reshape(rows.shape)
        out = np.empty(rows.shape, dtype=np.float32)
        step = max(1, SCORED_AT_ONCE // (rows.shape[1] * self.design.dim))
        for at in range(0, len(rows), step):
            here = slice(at, at + step)
            out[here] = (vectors[place[here]] * queries[here, None, :]).sum(axis=2)  # each in the same order
        return out

    def vectors(self, rows: Rows) -> Vectors:
        """Give back the vectors (K, D) of rows (K,), as near as they are kept."""
        index = self._index if self.design.refine == "none" else self._index.refine_index
        if self.design.lists and self.design.refine == "none":
            ivf = faiss.extract_index_ivf(index)
            if not ivf.direct_map.type:
                ivf.make_direct_map()
        found: Vectors = faiss.downcast_index(index).reconstruct_batch(np.ascontiguousarray(rows, dtype=np.int64))
        return found


def _is(body: Any, kind: Kind) -> bool:
    """Whether a FAISS index is of a kind."""
    if not isinstance(body, getattr(faiss, CLASSES[kind])):
        return False
    return kind not in TYPES or body.sq.qtype == getattr(faiss.ScalarQuantizer, TYPES[kind])


@contextmanager
def _bounded(path: Path, design: Design) -> Iterator[None]:
    """Let FAISS take no more memory for a file than it can be worth; its bounds are the whole process's."""
    size = max(1, path.stat().st_size)  # a file holds no array that is larger, and no list without a byte
    tables = 32 * design.lists * design.dim  # that IVFPQ makes of what it read
    with _READING:
        before = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
        faiss.set_deserialization_vector_byte_limit(size + tables)
        faiss.set_deserialization_loop_limit(min(size, MAX_LOOPS))
        try:
            yield
        finally:
            faiss.set_deserialization_vector_byte_limit(before[0])
            faiss.set_deserialization_loop_limit(before[1])


class _Selector:
    """A mask as FAISS takes it: a bitmap, which must outlive the search."""

    def __init__(self, mask: Mask | None) -> None:
        self.argument: dict[str, Any] = {}
        if mask is not None:
            self._bits = np.packbits(mask, bitorder="little")
            self.argument["sel"] = faiss.IDSelectorBitmap(self._bits)


def threads(count: int) -> None:
    """Let FAISS use so many threads in this process."""
    faiss.omp_set_num_threads(count)


def exact(vectors: Vectors, queries: Vectors, k: int) -> tuple[Vectors, Rows]:
    """Find the k best of vectors (N, D) for queries (B, D) without any index."""
    scores, rows = faiss.knn(queries, vectors, min(k, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)
    return scores, rows


def lists_of(size: int) -> int:
    """How many inverted lists suit so many vectors: the power of two that is nearest to the root."""
    return int(2 ** np.clip(np.round(np.log2(max(size, 1) ** 0.5)), 4, 20))


def sample_size(design: Design) -> int:
    """How many vectors a design is trained from, at most."""
    return max(design.lists * TRAINED_ON, 20_000)


def ladders(design: Design) -> list[list[Effort]]:
    """Efforts that are tried for a recall: ladders, each from the least to the most."""
    if design.exact:
        return [[Effort()]]
    if design.kind == "hnsw":
        return [[Effort(breadth=b) for b in (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)]]
    steps = sorted({min(design.lists, round(2 ** (i / 3))) for i in range(3 * 21)})
    if design.refine == "none":
        return [[Effort(lists=n) for n in steps]]
    return [[Effort(lists=n, again=again) for n in steps] for again in AGAIN]


def _floats(vectors: Vectors) -> Vectors:
    return np.ascontiguousarray(vectors, dtype=np.float32)
