"""The query encoder compiled for the processor that it runs on, and held to the model that was trained.

OpenVINO computes it in bfloat16 where the processor does (AMX, AVX512-BF16) and that pays, else in float32. Texts
of a BERT are laid end to end into blocks of a few lengths, where tokens attend to their own text alone: nothing is
computed for padding, and no shape is new while serving. Other architectures are compiled as they are, for padded
batches. What does not compile, and all that is on a GPU, stays in torch. Knows nothing of training or serving.
Shapes: B texts, L tokens of the longest, T tokens of a block, N tokens of some texts, D dimensions.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, export
from transformers import BertModel

from askew.encoders import TextEncoder
from askew.errors import ArtifactError
from askew.fusion import Hidden
from askew.inputs import PADDING
from askew.models import CANARIES, Model, Vectors
from askew.towers import TwoTower, indexed_queries
from askew.words import clean

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # or every import is told to its maker
import openvino  # noqa: E402

Precision = Literal["auto", "bf16", "fp32"]
Encode = Callable[[Sequence[str]], Vectors]
Ids = NDArray[np.int64]

HINTS: Mapping[str, str] = {"bf16": "bf16", "fp32": "f32"}
LENGTHS = (8, 16, 32, 64)  # of blocks, in tokens; longer ones hardly cost less a token
NEAR = 0.999  # the cosine of a compiled vector and the trained model's, at least
WIDE = 256  # numbers of a token's hidden vector, from which on bfloat16 saves time: narrower towers keep float32
NO_TEXT, APART = -1, -1e9  # the number of what is in no text; what attention adds between two texts


class CompiledEncoder:
    """The query tower of a loaded model, fast; for one caller at a time.

    `runtime` tells what became of it: "openvino bf16", "openvino fp32" or "torch".
    """

    def __init__(self, model: Model, precision: Precision = "auto", threads: int = 1) -> None:
        """Compile, and compare with the trained model. Raises ArtifactError when the vectors differ."""
        self._dim = model.dim
        first, *others = _precisions(model, precision)
        try:
            self._take(model, first, threads)
        except ArtifactError as error:
            if not others:
                raise
            print(f"askew: warning: {error}; now in {others[0]}", flush=True)
            self._take(model, others[0], threads)

    def queries(self, texts: Sequence[str]) -> Vectors:
        """Encode n queries to (n, dim), as `Model.queries` does."""
        return self._encode(texts) if texts else np.empty((0, self._dim), dtype=np.float32)

    def _take(self, model: Model, precision: str, threads: int) -> None:
        encode = compiled(model, precision, threads)
        check(encode, model, precision)
        self._encode = encode
        self.runtime = "torch" if encode == model.queries else f"openvino {precision}"


def check(encode: Encode, model: Model, name: str) -> None:
    """Compare with the trained model on all canaries, together and alone; this warms up, too.

    Raises ArtifactError for a cosine below NEAR.
    """
    for texts in (list(CANARIES), *([text] for text in CANARIES)):
        found, wanted = encode(texts), model.queries(texts)
        lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
        cosines = np.einsum("nd,nd->n", found, wanted) / lengths
        worst = int(np.argmin(cosines))  # a NaN counts as the least
        if not cosines[worst] >= NEAR:
            raise ArtifactError(
                f"a query encoder within a cosine of {NEAR} of the trained model",
                f"{cosines[worst]:.4f} for {texts[worst]!r} in {name}",
                "serve it in fp32, by the versions that constraints.txt names",
            )


def compiled(model: Model, precision: str, threads: int) -> Encode:
    """Compile the query tower of a model, where that can be done; else it stays in torch, with a warning."""
    if _device(model).type != "cpu":
        return model.queries
    try:
        fit = _Laid if isinstance(model.towers.query.body, BertModel) else _Padded
        return fit(model, precision, threads).queries
    except Exception as error:  # torch and OpenVINO raise whatever they stumble over
        told = next(iter(str(error).splitlines()), "")
        print(f"askew: warning: the query encoder stays in torch: {type(error).__name__}: {told}", flush=True)
        return model.queries


def _precisions(model: Model, precision: Precision) -> list[str]:
    """What is tried: one, or two of which the second is the way out."""
    if precision != "auto":
        return [precision]
    if _device(model).type != "cpu" or model.towers.query.project.in_features < WIDE:
        return ["fp32"]
    able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ["bf16", "fp32"] if "BF16" in able else ["fp32"]


def _device(model: Model) -> torch.device:
    return next(model.towers.parameters()).device


# --- texts laid end to end -----------------------------------------------------------------------


class _Laid:
    """A BERT, for blocks of fixed lengths."""

    def __init__(self, model: Model, precision: str, threads: int) -> None:
        settings, config = model.towers.settings, model.towers.query.body.config
        self._tokens, self._dim, self._length = model.tokens, model.dim, settings.query_length
        self._padding = int(config.pad_token_id or 0)
        graph = _graph(_Tower(_laid(model.towers)), torch.zeros(3, 24, dtype=torch.int32), {1: Dim.DYNAMIC})
        lengths = (*LENGTHS, self._length) if self._length > LENGTHS[-1] else LENGTHS
        self._blocks = [_Block(graph, length, precision, threads) for length in lengths]

    def queries(self, texts: Sequence[str]) -> Vectors:
        """Encode texts, as many to a block as there is room for."""
        ids_BL = self._tokens.ids([clean(text) for text in texts], self._length)
        mask_BL = ids_BL != PADDING
        mask_BL[:, 0] = True  # as in `TextEncoder`
        of_N, place_N = np.nonzero(mask_BL)
        ids_N = ids_BL[mask_BL]
        ids_N[ids_N == PADDING] = self._padding
        laid_3N, ends_B = np.stack([ids_N, place_N, of_N]), np.cumsum(mask_BL.sum(1))
        out = np.empty((len(texts), self._dim), dtype=np.float32)
        for first, stop in self._parts(ends_B):
            part_3N = laid_3N[:, ends_B[first - 1] if first else 0 : ends_B[stop - 1]]
            block = next(block for block in self._blocks if block.length >= part_3N.shape[1])
            out[first:stop] = block(part_3N, first)[: stop - first]
        return out

    def _parts(self, ends_B: Ids) -> Iterator[tuple[int, int]]:
        """Part the texts into runs that fit the longest block; yields the first of each, and where it stops."""
        first, start = 0, 0
        while first < len(ends_B):
            stop = int(np.searchsorted(ends_B, start + self._blocks[-1].length, side="right"))
            yield first, stop
            first, start = stop, int(ends_B[stop - 1])


class _Block:
    """The tower over T tokens, with its own place in memory for what goes in and comes out."""

    def __init__(self, graph: openvino.Model, length: int, precision: str, threads: int) -> None:
        graph = graph.clone()
        graph.reshape([3, length])
        self.length, self._request = length, _request(graph, precision, threads)
        self._laid_3T = np.zeros((3, length), dtype=np.int32)
        self._request.set_input_tensor(openvino.Tensor(self._laid_3T, shared_memory=True))
        self._vectors_TD: Vectors = self._request.get_output_tensor().data

    def __call__(self, laid_3N: Ids, first: int) -> Vectors:
        """Encode texts numbered from `first`; a view of (T, D), of which the first rows are theirs."""
        num = laid_3N.shape[1]
        self._laid_3T[:, :num] = laid_3N
        self._laid_3T[2, :num] -= first
        self._laid_3T[2, num:] = NO_TEXT  # what stood there before is computed, and counts for nothing
        self._request.infer()
        return self._vectors_TD


class _LaidEncoder(nn.Module):
    """A text encoder over (3, T): token ids, their places in their texts, and the numbers of these."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.body, self.project, self._pooling = encoder.body, encoder.project, encoder.settings.pooling

    def forward(self, laid_3T: Tensor) -> Hidden:
        """Encode the texts; row n is that of text n."""
        ids_T, place_T, of_T = laid_3T.unbind()
        apart_TT = torch.where(of_T[:, None] == of_T, 0.0, APART)
        out = self.body(input_ids=ids_T[None], position_ids=place_T[None], attention_mask=apart_TT[None, None])
        tokens_TW = out.last_hidden_state[0]
        pooled_TT = torch.arange(of_T.shape[0], dtype=of_T.dtype)[:, None] == of_T
        if self._pooling == "cls":
            pooled_TT = pooled_TT & (place_T == 0)
        weight_TT = pooled_TT.to(tokens_TW.dtype)
        pooled_TW = (weight_TT @ tokens_TW) / weight_TT.sum(1, keepdim=True).clamp(min=1)
        return Hidden(self.project(pooled_TW), tokens_TW[None], pooled_TT)


def _laid(towers: TwoTower) -> TwoTower:
    """The same towers, with the same parameters, whose queries are laid end to end."""
    same = copy.deepcopy(towers, {id(parameter): parameter for parameter in towers.parameters()})
    same.add_module("query", _LaidEncoder(same.query))
    return same


# --- padded batches ------------------------------------------------------------------------------


class _Padded:
    """Any text encoder, for batches of any shape."""

    def __init__(self, model: Model, precision: str, threads: int) -> None:
        self._tokens, self._length = model.tokens, model.towers.settings.query_length
        shape = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
        graph = _graph(_Tower(model.towers), torch.from_numpy(self._ids(CANARIES[6:9])), shape)
        self._request = _request(graph, precision, threads)

    def _ids(self, texts: Sequence[str]) -> Ids:
        return self._tokens.ids([clean(text) for text in texts], self._length)

    def queries(self, texts: Sequence[str]) -> Vectors:
        """Encode texts, padded to the longest of them."""
        vectors: Vectors = self._request.infer({0: self._ids(texts)}, share_inputs=True)[0]
        return vectors


# --- OpenVINO ------------------------------------------------------------------------------------


class _Tower(nn.Module):
    """Queries to what the index is searched with."""

    def __init__(self, towers: TwoTower) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, ids: Tensor) -> Tensor:
        """Encode token ids, as the towers' query encoder takes them."""
        return indexed_queries(*self.towers.queries(ids), self.towers.settings.header)


def _graph(tower: nn.Module, example: Tensor, shape: dict[int, Any]) -> openvino.Model:
    """Convert a tower; `shape` says which dimensions of its input are free."""
    with torch.no_grad():
        return openvino.convert_model(export(tower.eval(), (example,), dynamic_shapes=(shape,), strict=False))


def _request(graph: openvino.Model, precision: str, threads: int) -> openvino.InferRequest:
    """Compile a graph; not bound to certain cores, which other replicas would be bound to as well."""
    how = {
        "INFERENCE_PRECISION_HINT": HINTS[precision], "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False,
    }  # fmt: skip
    return openvino.Core().compile_model(graph, "CPU", how).create_infer_request()
