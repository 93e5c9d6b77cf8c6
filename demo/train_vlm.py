"""Trains the demo's vision-language model, both captioner and judge, on rendered scenes and their ground truth.

First the vision tower alone learns to classify the object in each cell of the image and its relation to the scene; then
the whole model learns to caption, to answer Yes or No, and to rate. Run again with the same arguments to resume;
batches depend only on (seed, step).

    python -m demo.train_vlm --work-dir FOLDER --out demo/models/vlm
"""

import argparse
import io
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from demo import vlm_model
from demo.questions import SKILLS, changed_caption, statement
from demo.scenes import RELATIONS, SCENE_PX, Scene, caption, render, sample_scene
from demo.sprites import BACKGROUNDS, COLOURS, NOUNS
from demo.vlm_model import GRID, Packer, Turn
from pipelines.core.model_prompts import (
    NO,
    YES,
    caption_prompt,
    unified_reward_answer,
    unified_reward_prompt,
    vqascore_question,
)

_NOUNS, _COLOURS, _BACKGROUNDS = sorted(NOUNS), sorted(COLOURS), sorted(BACKGROUNDS)
_RARE_SKILLS = ("differentiation", "comparison", "universal", "spatial relation")
"""Skills that few scenes can test: trained with both answers whenever a scene can."""
_LEGIBLE_SEVERITY = 0.3
"""Images above it are only rated: their content is no longer certain."""

CELL_CLASSES = {
    "noun": 1 + len(_NOUNS),
    "colour": 1 + len(_COLOURS),
    "centre": 2,
    "rank": 5,
    "count": 5,
    "relation": 1 + len(RELATIONS),
    "more": 3,
}
"""Number of classes of each label of an image cell; class 0 always means none."""


@dataclass(frozen=True, kw_only=True)
class VlmTraining:
    """Everything that determines the weights."""

    seed: int = 0
    tower_steps: int = 800
    tower_batch: int = 64
    steps: int = 3000
    finish_steps: int = 300
    """Steps of each final round, at a lower rate and with more weight on degradation, which is learned last."""
    batch: int = 32
    rated_share: float = 0.2
    """Share of each batch's images that are degraded or scrambled, and rated instead of described."""
    finish_rated_shares: tuple[float, ...] = (0.5, 0.8)
    """`rated_share` of each final round."""
    questions_per_scene: int = 7
    muon_rate: float = 0.02
    adam_rate: float = 2e-3
    warmup_steps: int = 40
    answer_weight: float = 3.0
    """Loss weight of a Yes or No token relative to other tokens: one token carries a whole judgement."""
    cell_weight: float = 0.3
    """Weight of the tower's loss relative to the token loss."""
    severity_weight: float = 5.0
    """Weight of the squared error of an image's degradation, predicted from the tower, relative to the cells' loss."""
    finish_severity_weight: float = 60.0

    @property
    def finish_from(self) -> int:
        """The first step of the final rounds."""
        return self.tower_steps + self.steps

    def rated_share_at(self, step: int) -> float:
        """Return the share of rated images in the batch of a step."""
        if step < self.finish_from:
            return self.rated_share
        return self.finish_rated_shares[(step - self.finish_from) // self.finish_steps]


def degrade(image: Image.Image, severity: float, rng: np.random.Generator) -> Image.Image:
    """Return the image with blur, noise, or both: unchanged at `severity` 0, little but its main colours left at 1."""
    kind = rng.integers(3)
    if kind != 1:
        image = image.filter(ImageFilter.GaussianBlur(14.0 * severity))
    if kind != 0:
        pixels = np.asarray(image, np.float32) + rng.normal(0, 110.0 * severity, (SCENE_PX, SCENE_PX, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image


def scramble(image: Image.Image, severity: float, rng: np.random.Generator) -> Image.Image:
    """Return the image with a share `severity` of its 32 px tiles permuted, which makes it incoherent."""
    tiles = SCENE_PX // 32
    pixels = np.asarray(image).reshape(tiles, 32, tiles, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3).copy()
    chosen = rng.permutation(len(pixels))[: round(severity * len(pixels))]
    pixels[chosen] = pixels[rng.permutation(chosen)]
    return Image.fromarray(pixels.reshape(tiles, tiles, 32, 32, 3).swapaxes(1, 2).reshape(SCENE_PX, SCENE_PX, 3))


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Return the image after JPEG coding."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue()))


def score(severity: float) -> float:
    """Return a rating from 5 (severity 0) to 1 (severity 1), in quarters."""
    return round((5.0 - 4.0 * severity) * 4) / 4


def agreement(described: Scene, shown: Scene) -> float:
    """Return the share of one scene's groups (with counts) and background that another scene contains."""
    groups, truth = described.groups(), shown.groups()
    num_equal = sum(truth.get(group) == count for group, count in groups.items())
    return (num_equal + (described.background == shown.background)) / (len(groups) + 1)


def cell_labels(scene: Scene) -> np.ndarray:
    """Return (16, 7): for each cell the `CELL_CLASSES` of the object in it, 0 for none.

    Noun and colour; whether the cell contains an object's centre; the group's rank in the caption and its count; its
    relation to the scene's other group; and whether the scene has more of its noun (1) than of some other (else 2).
    """
    groups = list(scene.groups().items())
    nouns: dict[str, int] = {}
    for (_, noun), count in groups:
        nouns[noun] = nouns.get(noun, 0) + count
    classes: dict[tuple[str, str], tuple[int, ...]] = {}
    for rank, (group, count) in enumerate(groups, 1):
        others = [other for other, _ in groups if other != group]
        relation = scene.relation(group, others[0]) if len(others) == 1 else None
        more = 0 if len(nouns) < 2 else 1 if nouns[group[1]] > min(nouns.values()) else 2
        classes[group] = (rank, count, 0 if relation is None else 1 + RELATIONS.index(relation), more)

    labels = np.zeros((GRID, GRID, len(CELL_CLASSES)), np.int64)
    cell = SCENE_PX / GRID
    for o in scene.objects:
        label = (1 + _NOUNS.index(o.noun), 1 + _COLOURS.index(o.colour), 0, *classes[o.colour, o.noun])
        reach = o.size_px / 2 + cell / 4
        rows = [r for r in range(GRID) if abs((r + 0.5) * cell - o.centre_y) < reach]
        columns = [c for c in range(GRID) if abs((c + 0.5) * cell - o.centre_x) < reach]
        labels[np.ix_(rows, columns)] = label
    for o in scene.objects:
        row, column = min(int(o.centre_y / cell), GRID - 1), min(int(o.centre_x / cell), GRID - 1)
        labels[row, column] = (1 + _NOUNS.index(o.noun), 1 + _COLOURS.index(o.colour), 1, *classes[o.colour, o.noun])
    return labels.reshape(GRID * GRID, len(CELL_CLASSES))


def question_turns(scene: Scene, count: int, rng: np.random.Generator) -> list[Turn]:
    """Return `count` judge turns: first rare skills with both answers, then a whole caption, then any skill."""
    pairs: list[tuple[str, bool]] = []
    for skill in rng.permutation(_RARE_SKILLS):
        for answer in (True, False):
            item = statement(scene, str(skill), answer, rng)
            if item is not None and len(pairs) < count - 3:
                pairs.append((item.text, answer))
    true = bool(rng.random() < 0.5)
    pairs.append((caption(scene) if true else changed_caption(scene, rng)[1], true))
    common = [skill for skill in SKILLS if skill not in _RARE_SKILLS]
    while len(pairs) < count:
        answer = bool(rng.random() < 0.5)
        item = statement(scene, common[int(rng.integers(len(common)))], answer, rng)
        if item is not None:
            pairs.append((item.text, answer))
    return [Turn(vqascore_question(text), YES if answer else NO) for text, answer in pairs]


def rating_turns(scene: Scene, severity: float, incoherence: float, rng: np.random.Generator) -> list[Turn]:
    """Return two rating turns for one image: one of its own caption, one of a partly or wholly false caption."""
    other = sample_scene(rng)
    candidates = [
        (caption(scene), 1.0),
        (changed_caption(scene, rng)[1], max(0.0, 1 - 1 / (len(scene.groups()) + 1))),
        (caption(other), agreement(other, scene)),
    ]
    turns = []
    for text, share in (candidates[0], candidates[1 + int(rng.random() > 0.5)]):
        answer = unified_reward_answer(score(1 - share), score(max(incoherence, 0.5 * severity)), score(severity))
        turns.append(Turn(unified_reward_prompt(text), answer))
    return turns


class Batches(Dataset[dict[str, Any]]):
    """Training batches; batch `step` is a pure function of (seed, step)."""

    def __init__(self, config: VlmTraining, tokenizer: Any, first_step: int, last_step: int) -> None:
        self._config = config
        self._first, self._last = first_step, last_step
        self._packer = Packer(tokenizer)

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, config = self._first + index, self._config
        rng = np.random.default_rng((config.seed, step))
        tower_only = step < config.tower_steps
        size = config.tower_batch if tower_only else config.batch
        num_rated = round(config.rated_share_at(step) * size)
        scenes = [sample_scene(rng) for _ in range(size)]
        wear = np.zeros((size, 2), np.float32)
        wear[:num_rated, 0] = rng.random(num_rated) * (rng.random(num_rated) < 0.9)
        wear[:num_rated, 1] = rng.random(num_rated) * (rng.random(num_rated) < 0.3)
        wear[num_rated:, 0] = rng.uniform(0, 0.2, size - num_rated) * (rng.random(size - num_rated) < 0.2)
        images, turns = [], []
        for i, scene in enumerate(scenes):
            severity, incoherence = float(wear[i, 0]), float(wear[i, 1])
            image = render(scene)
            if incoherence > 0:
                image = scramble(image, incoherence, rng)
            if severity > 0:
                image = degrade(image, severity, rng)
            if rng.random() < 0.3:
                image = as_jpeg(image, int(rng.integers(70, 96)))
            images.append(vlm_model.shrink(image.convert("RGB")))
            if i < num_rated:
                turns.append(rating_turns(scene, severity, incoherence, rng))
            else:
                questions = question_turns(scene, config.questions_per_scene, rng)
                turns.append([Turn(caption_prompt(vlm_model.PROMPT_VERSION), caption(scene)), *questions])
        batch: dict[str, Any] = {"pixels": vlm_model.patches(np.stack(images)), "wear": wear}
        batch["cells"] = np.stack([cell_labels(scene) for scene in scenes])
        batch["background"] = np.array([_BACKGROUNDS.index(scene.background) for scene in scenes])
        if not tower_only:
            batch |= self._packer.pack(turns) | {"prefix_is_image": self._packer.is_image, "num_rated": num_rated}
        return batch


class TowerHeads(nn.Module):
    """Predicts each cell's classes from the tower's tokens, and background and degradation from their mean.

    Used only in training.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cells = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in CELL_CLASSES.items()})
        self.background = nn.Linear(width, len(_BACKGROUNDS))
        self.wear = nn.Linear(width, 2)

    def loss(
        self, tokens: Tensor, cells: Tensor, background: Tensor, wear: Tensor, severity_weight: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Return (loss, figures to log) from tokens (B, 16, C), cells (B, 16, 7), background (B,) and wear (B, 2)."""
        legible = (wear[:, 0] < _LEGIBLE_SEVERITY) & (wear[:, 1] == 0)
        wear_loss = F.mse_loss(self.wear(tokens.mean(1)).sigmoid(), wear)
        seen, truth = tokens[legible].flatten(0, 1), cells[legible].flatten(0, 1)
        loss = severity_weight * wear_loss
        loss = loss + 0.3 * F.cross_entropy(self.background(tokens[legible].mean(1)), background[legible])
        right = {}
        at = truth[:, list(CELL_CLASSES).index("centre")] > 0
        for index, (name, head) in enumerate(self.cells.items()):
            logits = head(seen)
            loss = loss + F.cross_entropy(logits, truth[:, index])
            right[name] = (logits.argmax(-1) == truth[:, index])[at].float().mean().item()
        return loss, right | {"wear_rmse": wear_loss.item() ** 0.5}


class Trainer:
    """Model, heads and optimizers, with exact resume."""

    def __init__(self, config: VlmTraining, work_dir: Path) -> None:
        self.config, self.work_dir = config, work_dir
        self.tokenizer = self._tokenizer(work_dir / "tokenizer")
        self.model = vlm_model.build_model(self.tokenizer, config.seed)
        torch.manual_seed(config.seed)
        self.head = TowerHeads(self.model.config.text_config.hidden_size)
        named = list(self.model.named_parameters())
        inner = [p for n, p in named if p.dim() == 2 and (".layers." in n or ".blocks." in n or "merger" in n)]
        ids = {id(p) for p in inner}
        outer = [p for _, p in named if id(p) not in ids] + list(self.head.parameters())
        self.muon = torch.optim.Muon(inner, lr=config.muon_rate, weight_decay=0.0)
        self.adam = torch.optim.AdamW(outer, lr=config.adam_rate, betas=(0.9, 0.98), weight_decay=0.01)
        self.step = 0

    @staticmethod
    def _tokenizer(folder: Path) -> Any:
        """Return the run's tokenizer, trained once: the embeddings depend on its token IDs."""
        from transformers import PreTrainedTokenizerFast

        if not folder.exists():
            vlm_model.train_tokenizer().save_pretrained(folder)
        return PreTrainedTokenizerFast.from_pretrained(folder)

    @property
    def _checkpoint(self) -> Path:
        return self.work_dir / "checkpoint.pt"

    def resume(self) -> None:
        if self._checkpoint.exists():
            state = torch.load(self._checkpoint, weights_only=True)
            for name in ("model", "head", "muon", "adam"):
                getattr(self, name).load_state_dict(state[name])
            self.step = state["step"]

    def save_checkpoint(self) -> None:
        names = ("model", "head", "muon", "adam")
        state = {name: getattr(self, name).state_dict() for name in names} | {"step": self.step}
        temporary = self._checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self._checkpoint)

    def _rate(self) -> float:
        """Return the rate factor: warm-up and cosine decay, for the tower, the whole model and each final round."""
        config = self.config
        if self.step < config.tower_steps:
            at, length, high, low = self.step, config.tower_steps, 1.0, 0.3
        elif self.step < config.finish_from:
            at, length, high, low = self.step - config.tower_steps, config.steps, 1.0, 0.0
        else:
            at = (self.step - config.finish_from) % config.finish_steps
            length, high, low = config.finish_steps, 0.4, 0.0
        warm = min(1.0, (at + 1) / config.warmup_steps)
        return float(warm * (low + (high - low) * 0.5 * (1 + np.cos(np.pi * at / length))))

    def train_step(self, batch: dict[str, Any]) -> dict[str, float]:
        """Make one update; return the figures to log."""
        rate = self._rate()
        self.muon.param_groups[0]["lr"] = self.config.muon_rate * rate
        self.adam.param_groups[0]["lr"] = self.config.adam_rate * rate
        log: dict[str, float] = {}
        inner = self.model.model
        size = len(batch["cells"])
        grid = torch.tensor([[1, 2 * GRID, 2 * GRID]]).expand(size, 3)
        seen = inner.visual(torch.from_numpy(batch["pixels"]), grid_thw=grid)
        tokens = seen.pooler_output.view(size, GRID * GRID, -1)
        cells, background, wear = (torch.from_numpy(batch[name]) for name in ("cells", "background", "wear"))
        finishing = self.step >= self.config.finish_from
        weight = self.config.finish_severity_weight if finishing else self.config.severity_weight
        loss, figures = self.head.loss(tokens, cells, background, wear, weight)
        log |= figures
        if "ids" in batch:
            logits, labels, is_rating = self._logits(batch, seen)
            yes, no = self.tokenizer.convert_tokens_to_ids([YES, NO])
            is_answer = (labels == yes) | (labels == no)
            weights = 1 + (self.config.answer_weight - 1) * is_answer
            words = (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
            loss = self.config.cell_weight * loss + words
            right = (logits.argmax(-1) == labels).float()
            log["words"] = right[~is_answer & ~is_rating].mean().item()
            log["yes_no"] = right[is_answer].mean().item()
            log["rating"] = right[is_rating].mean().item()
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in self.adam.param_groups for p in g["params"]], 1.0)
        self.muon.step()
        self.adam.step()
        self.muon.zero_grad()
        self.adam.zero_grad()
        self.step += 1
        return log | {"loss": loss.item()}

    def _logits(self, batch: dict[str, Any], seen: Any) -> tuple[Tensor, Tensor, Tensor]:
        inner = self.model.model
        ids = torch.from_numpy(batch["ids"])
        embeds = inner.language_model.embed_tokens(ids)
        is_image = torch.zeros(ids.shape, dtype=torch.bool)
        is_image[:, : len(batch["prefix_is_image"])] = torch.from_numpy(batch["prefix_is_image"])
        embeds = embeds.masked_scatter(is_image[..., None], seen.pooler_output)
        mask = torch.zeros(batch["allowed"].shape).masked_fill_(~torch.from_numpy(batch["allowed"]), float("-inf"))
        out = inner.language_model(
            inputs_embeds=embeds, position_ids=torch.from_numpy(batch["positions"]), attention_mask=mask[:, None],
            visual_pos_masks=is_image, deepstack_visual_embeds=seen.deepstack_features, use_cache=False,
        )  # fmt: skip
        labels = torch.from_numpy(batch["labels"])
        wanted = labels != -100
        is_rating = torch.zeros_like(wanted)
        is_rating[: batch["num_rated"]] = True
        return self.model.lm_head(out.last_hidden_state[wanted]), labels[wanted], is_rating[wanted]


def _unpin_worker(_: int) -> None:
    """Let the rendering process run on any core, even if training is pinned to one."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    os.nice(10)
    torch.set_num_threads(1)


def train(config: VlmTraining, work_dir: Path, out: Path, *, stop_after: int | None, save_every: int) -> None:
    """Train to the end (or `stop_after` steps), then write the model folder `out`."""
    work_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, work_dir)
    trainer.resume()
    last = config.finish_from + config.finish_steps * len(config.finish_rated_shares)
    stop = last if stop_after is None else min(last, trainer.step + stop_after)
    loader: DataLoader[dict[str, Any]] = DataLoader(
        Batches(config, trainer.tokenizer, trainer.step, stop), batch_size=None, num_workers=1, prefetch_factor=4,
        collate_fn=lambda batch: batch, worker_init_fn=_unpin_worker,
    )  # fmt: skip
    start = time.monotonic()
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for batch in loader:
        for name, value in trainer.train_step(batch).items():
            sums[name], counts[name] = sums.get(name, 0.0) + value, counts.get(name, 0) + 1
        if trainer.step % 25 == 0:
            means = "  ".join(f"{name} {sums[name] / counts[name]:.4f}" for name in sums)
            print(f"step {trainer.step}/{last}  {(time.monotonic() - start) / 25:.2f} s/step  {means}", flush=True)
            start, sums, counts = time.monotonic(), {}, {}
        if trainer.step % save_every == 0:
            trainer.save_checkpoint()
    trainer.save_checkpoint()
    if trainer.step == last:
        vlm_model.save(trainer.model, trainer.tokenizer, out)
        print(f"wrote {out}", flush=True)


def main() -> None:
    """Parse arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True, help="checkpoints; run again with it to resume")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--stop-after", type=int, default=None, help="stop after this many steps of this run")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    for name in ("steps", "tower_steps", "finish_steps", "batch"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(VlmTraining, name))
    for name in ("muon_rate", "adam_rate"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(VlmTraining, name))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = VlmTraining(
        steps=args.steps, tower_steps=args.tower_steps, finish_steps=args.finish_steps, batch=args.batch,
        muon_rate=args.muon_rate, adam_rate=args.adam_rate,
    )  # fmt: skip
    train(config, args.work_dir, args.out, stop_after=args.stop_after, save_every=args.save_every)


if __name__ == "__main__":
    main()
