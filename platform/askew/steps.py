"""Steps: the training loop of one worker, called by Ray Train.

Each worker encodes its share of the global batch; item vectors are gathered from all workers with gradients, so
that every query meets the whole batch's items. What a step holds depends on the seed and the step alone, and a
checkpoint is all that a step needs: an interrupted run goes on as if it had not been.
"""

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import ray.train
import ray.train.torch
import torch
from numpy.typing import NDArray
from ray.train import Checkpoint, CheckpointUploadMode
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from askew import checkpoints, metrics
from askew.batches import Batch, Examples, Triplets
from askew.caching import backward
from askew.gather import gathered, gathered_rows, mean, rank, world
from askew.inputs import Tokens
from askew.journal import Journal
from askew.objective import Meeting, loss_of
from askew.recipes import PARTS, StageSettings, TrainSettings
from askew.towers import Encoded, Items, TwoTower

NDCG = "valid/nDCG_at_10"
AHEAD = 2  # batches that are made while a step runs
EXPLODED = 10.0  # times the stage's first loss
ITEMS_AT_ONCE = 256


def work(config: dict[str, Any]) -> None:
    """Run the training of one worker."""
    settings, context = TrainSettings.model_validate(config["settings"]), ray.train.get_context()
    watched = Journal(Path(config["journal"])).watching(f"node-{context.get_node_rank()}")
    with watched if context.get_local_rank() == 0 else nullcontext():
        Worker(
            settings, Tokens.parse(config["tokens"]).size, Path(config["layout"]), Path(config["journal"])
        ).run()


class Made(NamedTuple):
    """What a step works on."""

    examples: Examples
    batch: Batch
    meeting: Meeting
    negatives: float  # items that each query is told from, on average


class Worker:
    """One worker's loop."""

    def __init__(self, settings: TrainSettings, vocabulary: int, layout: Path, journal: Path) -> None:
        self.settings, self.triplets = settings, Triplets(layout)
        self.device = ray.train.torch.get_device()
        torch.manual_seed(settings.seed)
        self.towers = TwoTower(settings.towers, vocabulary)
        self.share = settings.batch_size // world()
        self.journal = Journal(journal) if rank() == 0 else None
        checkpoint = ray.train.get_checkpoint()
        self.first, self.last_ndcg = 0, None
        with _folder(checkpoint) as saved:
            if saved is None:
                self.towers.start()
            else:
                state = checkpoints.state_of(saved)
                self.first, self.last_ndcg = int(state["step"]), state.get(NDCG)
                checkpoints.load_result(saved, self.towers)
            self.towers.to(self.device).to(memory_format=torch.channels_last)  # as convolutions like it best
            if self.first < settings.steps:
                _, stage, at = settings.stage_of(self.first)
                self._begin(stage, saved if at else None, at)

    def _begin(self, stage: StageSettings, saved: Path | None = None, at: int = 0) -> None:
        """Freeze what the stage does not train, and make its optimiser and its running mean."""
        trained = stage.trained()
        if self.settings.towers.shared_text and "title" in trained:
            trained.add("query")
        self.towers.requires_grad_(False)
        groups: list[dict[str, Any]] = []
        for part in PARTS:
            parameters = list(_parameters(self.towers, part))
            for parameter in parameters if part in trained else ():
                parameter.requires_grad_(True)
            if part in trained and parameters:
                groups.append({"params": parameters, "factor": stage.rates.get(part, 1.0)})
        if stage.loss.kind == "info_nce" or stage.loss.domain:
            self.towers.log_scale.requires_grad_(True)
            groups.append({"params": [self.towers.log_scale], "factor": 1.0, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(
            groups, lr=stage.learning_rate, weight_decay=stage.weight_decay, fused=True
        )
        self.average = None
        if stage.average:  # so far the mean itself
            self.average = AveragedModel(self.towers, multi_avg_fn=partial(_average, stage.average))
            self.average.n_averaged.fill_(at)
        if saved is not None:
            checkpoints.load_weights(saved, self.towers)
            checkpoints.load_optimizer(saved, self.optimizer)
        self.towers.train()
        forward: nn.Module = self.towers
        if self.settings.compile:
            forward = torch.compile(self.towers, dynamic=True)  # type: ignore[assignment]
        how = {"forward_sync_buffers": False, "gradient_as_bucket_view": True}  # our buffers are constants
        self.model = ray.train.torch.prepare_model(forward, move_to_device=False, parallel_strategy_kwargs=how)
        self.highest = math.inf

    def run(self) -> None:
        """Do all steps that are left."""
        settings = self.settings
        progress = Progress(settings, self.first)
        with ThreadPoolExecutor(1) as pool:
            coming = {
                s: pool.submit(self.made, s) for s in range(self.first, min(self.first + AHEAD, settings.steps))
            }
            for step in range(self.first, settings.steps):
                name, stage, at = settings.stage_of(step)
                if at == 0 and step != self.first:
                    self.towers.load_state_dict(self.result.state_dict())
                    self._begin(stage)
                if step + AHEAD < settings.steps:
                    coming[step + AHEAD] = pool.submit(self.made, step + AHEAD)
                made = progress.waited(coming.pop(step))
                loss, terms = self.step(made, stage, at, step)
                progress.count(loss, terms, made)
                done = step + 1
                ends = at + 1 == stage.steps
                if (done % settings.report_every == 0 or ends) and not self._told(progress, name, done):
                    return
                if done % settings.checkpoint_every == 0 or ends:
                    self._validate(done, ends)
                    self._checkpoint(done)

    def step(self, made: Made, stage: StageSettings, at: int, step: int) -> tuple[Tensor, dict[str, float]]:
        """Take one step; returns this worker's loss and its terms."""
        for group in self.optimizer.param_groups:
            group["lr"] = stage.rate(at) * group["factor"]
        self.optimizer.zero_grad(set_to_none=True)
        meeting = Meeting(*(part.to(self.device, non_blocking=True) for part in made.meeting))

        def objective(encoded: Encoded) -> tuple[Tensor, dict[str, float]]:
            return loss_of(encoded, _everywhere(encoded.items), meeting, stage.loss)

        inputs = tuple(torch.from_numpy(array).to(self.device, non_blocking=True) for array in made.batch)
        at_once = self.settings.at_once or len(inputs[1])
        seed = (self.settings.seed * 1_000_003 + step) * 1009 + rank()
        loss, terms = backward(self.model, inputs, objective, at_once, seed, self._forward)  # type: ignore[arg-type]
        nn.utils.clip_grad_norm_((p for p in self.towers.parameters() if p.grad is not None), stage.clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.towers)
        return loss, terms

    @property
    def result(self) -> TwoTower:
        """What comes out of the stage: the running mean of its weights if it keeps one, else its weights."""
        return self.towers if self.average is None else cast(TwoTower, self.average.module)

    def _forward(self, *inputs: Tensor) -> Encoded:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16(self.settings, self.device)):
            encoded: Encoded = self.model(*inputs)
        return encoded

    def made(self, step: int) -> Made:
        """Make a step's batch, and tell who is whose in the whole of it."""
        _, stage, _ = self.settings.stage_of(step)
        starts = [step * self.settings.batch_size + worker * self.share for worker in range(world())]
        seed = self.settings.seed
        parts = [self.triplets.examples(seed, start, start + self.share, stage.batch) for start in starts]
        mine = parts[rank()]
        items = np.concatenate([part.items for part in parts])
        shown = [self.triplets.has_image(part) for part in parts]
        has_image = np.concatenate(shown)
        target = mine.targets() + sum(len(part.items) for part in parts[: rank()])
        masked = self.triplets.known(mine.queries, items)
        same = items[target][:, None] == items[None, :]
        masked[np.arange(len(target)), target] = same[np.arange(len(target)), target] = False
        photos, weights = _relative([one[: self.share] for one in shown]), _relative([p.weights for p in parts])
        meeting = (
            target, masked, same, mine.brings, has_image, photos, weights, self.triplets.log_q(items),
        )  # fmt: skip
        told = Meeting(*(torch.from_numpy(np.ascontiguousarray(part)) for part in meeting))
        return Made(
            mine,
            self.triplets.batch(mine, stage.batch, seed),
            told,
            float(len(items) - 1 - masked.sum() / len(target)),
        )

    def _told(self, progress: "Progress", stage: str, done: int) -> bool:
        """Report progress; false when the loss is not a number any more, or far too large, which is noted."""
        losses = mean(torch.stack(progress.losses)).tolist()
        if math.isinf(self.highest):
            self.highest = EXPLODED * losses[0] + 1
        wrong = [n for n, loss in enumerate(losses) if not loss <= self.highest]
        if wrong:
            step = done - len(losses) + wrong[0]
            if self.journal:
                self.journal.refuse({"step": step, "loss": losses[wrong[0]], "queries": self._queries(step)})
            return False
        line, values = progress.told(stage, done, losses)
        if self.journal:
            print(line, flush=True)
            self.journal.write(values, done)
        return True

    def _queries(self, step: int) -> list[int]:
        """Number the queries of a step, of all workers."""
        start, size = step * self.settings.batch_size, self.settings.batch_size
        batch = self.settings.stage_of(step)[1].batch
        found: list[int] = self.triplets.examples(self.settings.seed, start, start + size, batch).queries.tolist()
        return found

    def _validate(self, done: int, ends: bool) -> None:
        every = self.settings.validation.every
        if not self.triplets.has_validation or (done % every and not ends):
            return
        self.last_ndcg = self.ndcg()
        if self.journal:
            print(f"askew: train step {done:,} validation nDCG@10 {self.last_ndcg:.4f}", flush=True)
            self.journal.write({NDCG: self.last_ndcg}, done)

    @torch.inference_mode()
    def ndcg(self) -> float:
        """Rank the validation's items for its queries, each worker encoding a share of them; nDCG@10."""
        towers = self.result.eval()
        n = self.triplets.num_validation_items
        share = -(-n // world())
        start, stop = min(n, rank() * share), min(n, (rank() + 1) * share)
        vectors = torch.zeros(share, towers.settings.dim, device=self.device)
        for at in range(start, stop, ITEMS_AT_ONCE):
            batch = self.triplets.validation_items(at, min(stop, at + ITEMS_AT_ONCE))
            arrays = [torch.from_numpy(np.ascontiguousarray(array)).to(self.device) for array in batch[1:]]
            fused = towers.items(*arrays).fused
            vectors[at - start : at - start + len(fused)] = fused
        queries, _ = towers.queries(torch.from_numpy(self.triplets.validation_queries()).to(self.device))
        scores = queries @ gathered_rows(vectors)[:n].T
        top = scores.topk(min(10, n), dim=1)
        self.towers.train()
        ids = [str(number) for number in range(max(n, len(queries)))]
        run = metrics.Run(
            ids[: len(queries)], ids[:n], top.indices.cpu().numpy(), top.values.float().cpu().numpy()
        )
        qrels: dict[str, dict[str, int]] = {}
        for query, item, grade in self.triplets.validation_qrels().tolist():
            qrels.setdefault(str(query), {})[str(item)] = grade
        return metrics.score(qrels, run, ["nDCG@10"], min_relevant=1).means()["nDCG@10"]

    def _checkpoint(self, done: int) -> None:
        state = {"step": done, NDCG: self.last_ndcg if self.last_ndcg is not None else 0.0}
        if rank() != 0:
            ray.train.report(state)
            return
        folder = Path(tempfile.mkdtemp(prefix="askew-checkpoint-"))
        checkpoints.save(folder, self.towers, self.optimizer, state, self.average and self.average.module)
        ray.train.report(
            state, Checkpoint(str(folder)), checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )  # fmt: skip


class Progress:
    """What a worker has done since it last told, and how long it waited for data."""

    def __init__(self, settings: TrainSettings, first: int) -> None:
        self._settings, self._first = settings, first
        self._started = self._told = time.monotonic()
        self._waited = self._waited_in_all = 0.0
        self.losses: list[Tensor] = []
        self._terms: dict[str, float] = {}
        self._negatives = 0.0

    def waited(self, coming: "Future[Made]") -> Made:
        """Take a batch when it is there, and count the time until then."""
        start = time.monotonic()
        made = coming.result()
        self._waited += time.monotonic() - start
        return made

    def count(self, loss: Tensor, terms: dict[str, float], made: Made) -> None:
        """Count a step."""
        self.losses.append(loss)
        self._terms, self._negatives = terms, made.negatives

    def told(self, stage: str, done: int, losses: list[float]) -> tuple[str, dict[str, float]]:
        """Say how far it is, in words and in numbers, and begin to count anew."""
        now = time.monotonic()
        speed = self._settings.batch_size * len(losses) / (now - self._told)
        left = (now - self._started) / (done - self._first) * (self._settings.steps - done)
        waiting, loss = self._waited / (now - self._told), sum(losses) / len(losses)
        line = (
            f"askew: train step {done:,}/{self._settings.steps:,} ({stage}) loss {loss:.4f} {speed:,.0f} pairs/s, "
            f"{self._negatives:,.0f} negatives a query, {100 * waiting:.0f} % waiting for data, {left:,.0f} s left"
        )
        values = {
            "train/loss": loss, "train/pairs_per_s": speed, "train/negatives": self._negatives,
            "train/waiting": waiting, **{f"train/{name}": value for name, value in self._terms.items()},
        }  # fmt: skip
        self.losses, self._told, self._waited = [], now, 0.0
        return line, values


def bf16(settings: TrainSettings, device: torch.device) -> bool:
    """Whether to compute in bfloat16: as the settings say, or where the device has instructions for it."""
    if settings.bf16 is not None:
        return settings.bf16
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()


def _average(decay: float, means: list[Tensor], weights: list[Tensor], count: Tensor | int) -> None:
    """Carry the running mean of weights on by a step; a young mean forgets faster, as in TensorFlow."""
    torch._foreach_lerp_(means, weights, 1 - min(decay, (1 + int(count)) / (10 + int(count))))


def _parameters(towers: TwoTower, part: str) -> Iterator[nn.Parameter]:
    """The parameters of a part: with one text encoder, titles are the query's part."""
    modules: dict[str, list[nn.Module | None]] = {
        "query": [towers.query], "title": [towers.title], "photo": [towers.photo],
        "fusion": [towers.fusion, getattr(towers, "text_tokens", None), getattr(towers, "photo_tokens", None)],
        "header": [getattr(towers, "header", None)],
    }  # fmt: skip
    for module in modules[part]:
        if module is not None:
            yield from module.parameters()
    if part == "photo" and towers.photo is not None:
        yield towers.missing


def _everywhere(items: Items) -> Items:
    """Gather the items of all workers, all vectors in one message."""
    there = [part for part in items if part is not None]
    parts = iter(gathered(torch.cat(there, dim=1)).split(there[0].shape[1], dim=1))
    return Items(*(None if part is None else next(parts) for part in items))  # type: ignore[arg-type]


def _relative(weights: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    """Relate this worker's weights to the mean of all workers': the mean of their losses is then the whole's."""
    all_of_them = max(float(np.mean(np.concatenate(weights))), 1e-6)
    return np.asarray(weights[rank()] / all_of_them, dtype=np.float32)


@contextmanager
def _folder(checkpoint: Checkpoint | None) -> Iterator[Path | None]:
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)
