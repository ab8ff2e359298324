"""A trained model on disk and in memory: towers, tokenizer, and batches of texts and photos to vectors.

The folder is an artifact of plain files (`towers.json`, `weights.safetensors`, `tokenizer.json`): nothing
in it is ever unpickled. In `canaries.safetensors` are the vectors that the model gave when it was saved, of
queries and items that are always the same: whoever loads it can tell whether it still gives them. Knows nothing
of training, MLflow or Ray.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from askew import artifacts, tables
from askew.encoders import config_of
from askew.errors import ArtifactError, ConfigError
from askew.inputs import Tokens
from askew.towers import TowerSettings, TwoTower, indexed_items, indexed_queries
from askew.words import clean

SETTINGS, WEIGHTS, TOKENIZER = "towers.json", "weights.safetensors", "tokenizer.json"
VECTORS = "canaries.safetensors"
Vectors = NDArray[np.float32]

# Models hold the vectors of these: one that is changed here refuses every model there is.
CANARIES = (
    "mug", "a", "", "  ", "?!", "42", "red striped mug", "blue cap", "women's running shoes size 8",
    "salon chair", "turquoise pillows", "usb-c to hdmi 2.1 cable 2m", "RED STRIPED MUG", "red stripd mgu",
    "mug mug mug mug", "chair under $100", "iphone 15 pro max case", "9780140449136", "xqzzkrv wqpfj",
    "dress that is not black", "gift for a ten year old who likes dinosaurs", "50x70 cm picture frame (oak)",
    "🎁 birthday", "café crème brûlée torch", "rote gestreifte Tasse", "taza roja a rayas",
    "tasse à rayures rouges", "красная полосатая кружка", "赤い縞模様のマグカップ", "红色条纹杯子",
    "كوب أحمر مخطط", "लाल धारीदार मग",
    "solid wood extendable dining table with six upholstered grey chairs and matching bench for a small kitchen",
)  # fmt: skip
TITLES = (
    "red striped mug", "Mug, 350 ml", "women's running shoes, size 8, black/white", "rot gestreifte Tasse",
    "usb-c to hdmi 2.1 cable (2 m)", "赤い縞模様のマグカップ", "42", "",
)  # fmt: skip


class Model:
    """Both towers with their tokenizer, ready to encode."""

    def __init__(self, towers: TwoTower, tokens: Tokens, key: str = "") -> None:
        self.towers, self.tokens, self.key = towers.eval(), tokens, key
        self.dim, self.image_size = towers.settings.index_dim, towers.settings.image_size
        self.header = towers.settings.header
        self._device = next(towers.parameters()).device

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "Model":
        """Read a model artifact, checked against its manifest. Raises ArtifactError when it does not fit."""
        manifest = artifacts.read(folder, "model")
        tokens = Tokens.load(folder / TOKENIZER)
        try:
            settings = TowerSettings.model_validate_json((folder / SETTINGS).read_bytes())
            towers = TwoTower(settings, tokens.size)
            towers.load_state_dict(load_file(folder / WEIGHTS))
        except (ValidationError, RuntimeError, SafetensorError) as error:
            found = " ".join(str(error).split())[:300]
            raise ArtifactError(
                f"a model in {folder}", found, "train it again with this version of askew"
            ) from error
        return cls(towers.to(device), tokens, manifest.key)

    @classmethod
    def zero_shot(cls, checkpoint: str, device: str = "cpu") -> "Model":
        """Make towers of a CLIP or SigLIP checkpoint as it is; an item is the mean of its two vectors.

        Raises ConfigError when it cannot be read, or is of one modality.
        """
        config = config_of(checkpoint)
        if not {"text_config", "vision_config"} <= set(config):
            raise ConfigError(
                f"a checkpoint of text and vision at {checkpoint}", config["model_type"], "choose another"
            )
        dim = (
            config.get("projection_dim")
            if config["model_type"] == "clip"
            else config["text_config"]["hidden_size"]
        )
        settings = TowerSettings.model_validate({
            "dim": dim, "text": {"checkpoint": checkpoint}, "photo": {"checkpoint": checkpoint},
            "shared_text": True, "fusion": "mean", "image_size": config["vision_config"]["image_size"],
            "query_length": config["text_config"]["max_position_embeddings"],
            "title_length": config["text_config"]["max_position_embeddings"],
        }).read()  # fmt: skip
        tokens = Tokens.of_checkpoint(checkpoint)
        towers = TwoTower(settings, tokens.size)
        towers.start()
        return cls(towers.to(device), tokens)

    def save(self, folder: Path) -> None:
        """Write the model's files into `folder` (of an artifact's draft); the towers stay as they are."""
        settings = self.towers.settings.model_dump_json(indent=1)
        (folder / SETTINGS).write_text(settings, encoding="utf-8")
        save_file(
            {k: v.detach().contiguous().cpu() for k, v in self.towers.state_dict().items()}, folder / WEIGHTS
        )
        self.tokens.save(folder / TOKENIZER)
        plain = Model(copy.deepcopy(self.towers).cpu().float(), self.tokens)
        save_file(plain.canaries(), folder / VECTORS)

    def canaries(self) -> dict[str, Tensor]:
        """Encode the fixed queries and items, every other of which has a photo: "queries", "items" (n, dim)."""
        shape = (len(TITLES), self.image_size, self.image_size, 3)
        photos = np.random.RandomState(0).randint(0, 256, shape, np.uint8)  # alone is the same in every NumPy
        items = self.items(TITLES, photos, np.arange(len(TITLES)) % 2 == 0)["index"]
        return {"queries": torch.from_numpy(self.queries(CANARIES)), "items": torch.from_numpy(items)}

    @torch.inference_mode()
    def queries(self, texts: Sequence[str]) -> Vectors:
        """Encode n queries to (n, dim), as the index is searched: with SMAR's header [(1−p)·Q ; p·Q], else Q."""
        return _numpy(indexed_queries(*self._queries(texts), self.towers.settings.header))

    @torch.inference_mode()
    def plain_queries(self, texts: Sequence[str]) -> Vectors:
        """Encode n queries to Q, normalised, which the vectors "text", "image" and "fused" are compared with."""
        return _numpy(self._queries(texts)[0])

    def _queries(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = self.tokens.ids([clean(t) for t in texts], self.towers.settings.query_length)
        queries, gate = self.towers.queries(self._tensor(ids))
        return queries, gate

    @torch.inference_mode()
    def items(
        self, texts: Sequence[str], pixels: NDArray[np.uint8], has_image: NDArray[np.bool_]
    ) -> Mapping[str, Vectors]:
        """Encode n items to "text", "image" and "fused", normalised, and "index" (n, dim), what is indexed.

        A model of one modality has no vectors of the other.
        `pixels` is (n, image_size, image_size, 3) uint8; where `has_image` is false it is not read.
        """
        ids = self.tokens.ids([clean(t) for t in texts], self.towers.settings.title_length)
        vectors = self.towers.items(self._tensor(ids), self._tensor(pixels), self._tensor(has_image))
        found = {name: _numpy(vector) for name, vector in vectors._asdict().items() if vector is not None}
        return found | {"index": _numpy(indexed_items(vectors, self.towers.settings.header))}

    def embedded(self, rows: pa.RecordBatch) -> Vectors:
        """Encode n clean items, with their `text`, `pixels` and `has_image`, to what is indexed, (n, dim)."""
        photos = tables.pixels(rows["pixels"], self.image_size)
        there = rows["has_image"].to_numpy(zero_copy_only=False)
        return self.items(rows[tables.TEXT].to_pylist(), photos, there)["index"]

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.require(array, requirements=("C", "W"))).to(self._device)


def parity(folder: Path, device: str = "cpu") -> float:
    """Compare the canaries' vectors in a model artifact with those that the model gives now: the least cosine.

    1 is equal; NaN when a vector is no number. Raises ArtifactError when it holds none, or of other canaries.
    """
    if not (folder / VECTORS).is_file():
        raise ArtifactError(f"vectors of canaries in {folder / VECTORS}", "none", "train or register it again")
    found = Model.load(folder, device).canaries()
    try:
        kept = load_file(folder / VECTORS)
    except SafetensorError as error:
        do = "train or register it again"
        raise ArtifactError(f"vectors of canaries in {folder / VECTORS}", str(error), do) from error
    if {n: v.shape for n, v in kept.items()} != {n: v.shape for n, v in found.items()}:
        raise ArtifactError(
            f"vectors of this version's canaries in {folder / VECTORS}", "others", "train or register it again"
        )
    cosines = [F.cosine_similarity(kept[name].double(), found[name].double()) for name in found]
    return float(torch.cat(cosines).min())


def _numpy(tensor: Tensor) -> Vectors:
    array: Vectors = tensor.float().cpu().numpy()
    return array
