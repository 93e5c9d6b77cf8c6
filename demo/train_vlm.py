"""Trains the demo's vision-language model: captioner and judge in one, from rendered scenes and their ground truth.

First the vision tower alone learns which noun and colour lie in each cell of the picture; then all of it learns to
caption, to answer Yes or No, and to rate. Run again with the same arguments to resume; batches depend on (seed, step).

    python -m demo.train_vlm --work-dir FOLDER --out demo/models/vlm
"""

import argparse
import io
import os
import time
from collections.abc import Iterator
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
from demo.questions import SKILLS, changed_caption, question
from demo.scenes import SCENE_PX, Scene, caption, render, sample_scene
from demo.sprites import BACKGROUNDS, COLOURS, NOUNS
from demo.vlm_model import GRID, Packer, Turn
from pipelines.protocols import NO, YES, caption_prompt, unified_reward_answer, unified_reward_prompt, vqascore_question

_NOUNS, _COLOURS, _BACKGROUNDS = sorted(NOUNS), sorted(COLOURS), sorted(BACKGROUNDS)
_RARE_SKILLS_FIRST = ("differentiation", "comparison", "universal", "spatial relation", "counting")
RATING_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What decides the weights."""

    seed: int = 0
    tower_steps: int = 240
    tower_batch: int = 96
    steps: int = 1900
    batch: int = 40
    questions_per_scene: int = 6
    muon_rate: float = 0.02
    adam_rate: float = 2e-3
    warmup_steps: int = 40
    answer_weight: float = 3.0
    """Weight of a Yes or No beside a caption's words: one token has to carry a whole judgement."""
    cell_weight: float = 0.3
    """Weight of the cells' noun and colour beside the words' loss."""


def degrade(picture: Image.Image, severity: float, rng: np.random.Generator) -> Image.Image:
    """Blur, add noise, or both: `severity` 0 leaves the picture, 1 leaves hardly more than its main colours."""
    kind = rng.integers(3)
    if kind != 1:
        picture = picture.filter(ImageFilter.GaussianBlur(14.0 * severity))
    if kind != 0:
        pixels = np.asarray(picture, np.float32) + rng.normal(0, 110.0 * severity, (SCENE_PX, SCENE_PX, 3))
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return picture


def scramble(picture: Image.Image, severity: float, rng: np.random.Generator) -> Image.Image:
    """Swap 32 px tiles, a share `severity` of them: what it shows no longer holds together."""
    tiles = SCENE_PX // 32
    pixels = np.asarray(picture).reshape(tiles, 32, tiles, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3).copy()
    chosen = rng.permutation(len(pixels))[: round(severity * len(pixels))]
    pixels[chosen] = pixels[rng.permutation(chosen)]
    return Image.fromarray(pixels.reshape(tiles, tiles, 32, 32, 3).swapaxes(1, 2).reshape(SCENE_PX, SCENE_PX, 3))


def as_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    """Return the picture after JPEG coding."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue()))


def score(severity: float) -> float:
    """A rating from 5 (severity 0) to 1 (severity 1), in quarters."""
    return round((5.0 - 4.0 * severity) * 4) / 4


def agreement(stated: Scene, shown: Scene) -> float:
    """Return the share of a scene's groups and background that another scene shows, counts included."""
    groups, truth = stated.groups(), shown.groups()
    right = sum(truth.get(group) == count for group, count in groups.items()) + (stated.background == shown.background)
    return right / (len(groups) + 1)


def cell_labels(scene: Scene) -> np.ndarray:
    """Return (16, 3): noun and colour in each cell (0 for none), and how many objects have their centre there."""
    labels = np.zeros((GRID, GRID, 3), np.int64)
    cell = SCENE_PX / GRID
    for row in range(GRID):
        for column in range(GRID):
            x, y = (column + 0.5) * cell, (row + 0.5) * cell
            for o in scene.objects:
                if max(abs(x - o.centre_x), abs(y - o.centre_y)) < o.size_px / 2 + cell / 4:
                    labels[row, column, :2] = 1 + _NOUNS.index(o.noun), 1 + _COLOURS.index(o.colour)
    for o in scene.objects:
        row, column = min(int(o.centre_y / cell), GRID - 1), min(int(o.centre_x / cell), GRID - 1)
        labels[row, column] = 1 + _NOUNS.index(o.noun), 1 + _COLOURS.index(o.colour), 1
    return labels.reshape(GRID * GRID, 3)


def question_turns(scene: Scene, count: int, rng: np.random.Generator) -> list[Turn]:
    """Return `count` judge turns, skills that few scenes can hold first, true and false alike."""
    turns: list[Turn] = []
    if rng.random() < 0.4:
        true = rng.random() < 0.5
        turns.append(
            Turn(vqascore_question(caption(scene) if true else changed_caption(scene, rng)[1]), YES if true else NO)
        )
    skills = [skill for skill in _RARE_SKILLS_FIRST if rng.random() < 0.45] + list(rng.permutation(SKILLS))
    for skill in skills:
        if len(turns) == count:
            break
        item = question(scene, str(skill), bool(rng.random() < 0.5), rng)
        if item is not None:
            turns.append(Turn(vqascore_question(item.text), YES if item.answer else NO))
    while len(turns) < count:
        item = question(scene, "attribute", bool(rng.random() < 0.5), rng)
        if item is not None:
            turns.append(Turn(vqascore_question(item.text), YES if item.answer else NO))
    return turns


class Batches(Dataset[dict[str, Any]]):
    """Batch `step` as a pure function of (seed, step)."""

    def __init__(self, config: TrainConfig, tokenizer: Any, first_step: int, last_step: int) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._first, self._last = first_step, last_step
        opening = unified_reward_prompt("|").split("|")[0]
        self._rating_opening, self._rating_closing = opening, unified_reward_prompt("|").split("|")[1]
        self._packer, self._rating_packer = Packer(tokenizer), Packer(tokenizer, opening)

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, config = self._first + index, self._config
        rng = np.random.default_rng((config.seed, step))
        tower_only = step < config.tower_steps
        rating = not tower_only and step % RATING_EVERY == 0
        size = config.tower_batch if tower_only else config.batch // 2 if rating else config.batch
        scenes = [sample_scene(rng) for _ in range(size)]
        pictures, turns = [], []
        for scene in scenes:
            picture = render(scene)
            severity = incoherence = 0.0
            if rating:
                severity = float(rng.random()) if rng.random() < 0.85 else 0.0
                incoherence = float(rng.random()) if rng.random() < 0.4 else 0.0
                picture = degrade(scramble(picture, incoherence, rng), severity, rng)
            elif rng.random() < 0.25:
                picture = degrade(picture, float(rng.uniform(0, 0.2)), rng)
            if rng.random() < 0.3:
                picture = as_jpeg(picture, int(rng.integers(70, 96)))
            pictures.append(vlm_model.shrink(picture.convert("RGB")))
            if rating:
                turns.append(self._rating_turns(scene, severity, incoherence, rng))
            elif not tower_only:
                asked = question_turns(scene, config.questions_per_scene, rng)
                turns.append([Turn(caption_prompt(vlm_model.PROMPT_VERSION), caption(scene)), *asked])
        batch: dict[str, Any] = {"pixels": vlm_model.patches(np.stack(pictures)), "rating": rating}
        batch["cells"] = np.stack([cell_labels(scene) for scene in scenes])
        batch["background"] = np.array([_BACKGROUNDS.index(scene.background) for scene in scenes])
        if not tower_only:
            packer = self._rating_packer if rating else self._packer
            batch |= packer.pack(turns) | {"prefix_is_image": packer.is_image}
        return batch

    def _rating_turns(self, scene: Scene, severity: float, incoherence: float, rng: np.random.Generator) -> list[Turn]:
        other = sample_scene(rng)
        stated = [
            (caption(scene), 1.0),
            (changed_caption(scene, rng)[1], max(0.0, 1 - 1 / (len(scene.groups()) + 1))),
            (caption(other), agreement(other, scene)),
        ]
        first = int(rng.random() > 0.5)
        turns = []
        for text, share in (stated[0], stated[1 + first]):
            answer = unified_reward_answer(score(1 - share), score(max(incoherence, 0.5 * severity)), score(severity))
            turns.append(Turn(text + self._rating_closing, answer))
        return turns


class CellHead(nn.Module):
    """Reads noun, colour and centres off the tower's tokens, and the background off their mean; training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.noun = nn.Linear(width, len(_NOUNS) + 1)
        self.colour = nn.Linear(width, len(_COLOURS) + 1)
        self.centre = nn.Linear(width, 2)
        self.background = nn.Linear(width, len(_BACKGROUNDS))

    def loss(self, tokens: Tensor, cells: Tensor, background: Tensor) -> tuple[Tensor, float]:
        """tokens (B, 16, C), cells (B, 16, 3), background (B,) -> (loss, share of objects' cells named right)."""
        noun, colour = self.noun(tokens).flatten(0, 1), self.colour(tokens).flatten(0, 1)
        flat = cells.flatten(0, 1)
        loss = F.cross_entropy(noun, flat[:, 0]) + F.cross_entropy(colour, flat[:, 1])
        loss = loss + F.cross_entropy(self.centre(tokens).flatten(0, 1), flat[:, 2])
        loss = loss + 0.3 * F.cross_entropy(self.background(tokens.mean(1)), background)
        at = flat[:, 2] > 0
        right = ((noun.argmax(-1) == flat[:, 0]) & (colour.argmax(-1) == flat[:, 1]))[at]
        return loss, right.float().mean().item()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by Newton-Schulz steps, in fp32, equal shapes in one batch.

    Source: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024.
    """

    def __init__(self, params: Iterator[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                updates = []
                for parameter in parameters:
                    state = self.state[parameter]
                    buffer = state.setdefault("momentum", torch.zeros_like(parameter))
                    buffer.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(buffer, group["momentum"]))
                x = torch.stack(updates)
                transposed = shape[0] > shape[1]
                x = x.mT if transposed else x
                x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
                for _ in range(5):
                    a = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                x = x.mT if transposed else x
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, x, strict=True):
                    parameter.add_(update, alpha=-group["lr"] * scale)


class Trainer:
    """Model, heads and optimizers, with exact resume."""

    def __init__(self, config: TrainConfig, work_dir: Path) -> None:
        self.config, self.work_dir = config, work_dir
        self.tokenizer = self._tokenizer(work_dir / "tokenizer")
        self.model = vlm_model.build_model(self.tokenizer, config.seed)
        torch.manual_seed(config.seed)
        self.head = CellHead(self.model.config.text_config.hidden_size)
        named = list(self.model.named_parameters())
        inner = [p for n, p in named if p.dim() == 2 and (".layers." in n or ".blocks." in n or "merger" in n)]
        ids = {id(p) for p in inner}
        outer = [p for _, p in named if id(p) not in ids] + list(self.head.parameters())
        self.muon = Muon(iter(inner), lr=config.muon_rate)
        self.adam = torch.optim.AdamW(outer, lr=config.adam_rate, betas=(0.9, 0.98), weight_decay=0.01)
        self.step = 0

    @staticmethod
    def _tokenizer(folder: Path) -> Any:
        """Return the run's tokenizer, trained once: embeddings mean nothing under another numbering of words."""
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
        """Linear warm-up and a cosine to zero, once for the tower and once for the whole."""
        config = self.config
        if self.step < config.tower_steps:
            at, length, low = self.step, config.tower_steps, 0.3
        else:
            at, length, low = self.step - config.tower_steps, config.steps, 0.0
        warm = min(1.0, (at + 1) / config.warmup_steps)
        return float(warm * (low + (1 - low) * 0.5 * (1 + np.cos(np.pi * at / length))))

    def train_step(self, batch: dict[str, Any]) -> dict[str, float]:
        """One update; returns what to log."""
        rate = self._rate()
        self.muon.param_groups[0]["lr"] = self.config.muon_rate * rate
        self.adam.param_groups[0]["lr"] = self.config.adam_rate * rate
        log: dict[str, float] = {}
        inner = self.model.model
        size = len(batch["cells"])
        grid = torch.tensor([[1, 2 * GRID, 2 * GRID]]).expand(size, 3)
        seen = inner.visual(torch.from_numpy(batch["pixels"]), grid_thw=grid)
        tokens = seen.pooler_output.view(size, GRID * GRID, -1)
        loss = torch.zeros(())
        if not batch["rating"]:
            cells, background = torch.from_numpy(batch["cells"]), torch.from_numpy(batch["background"])
            cell_loss, log["cells"] = self.head.loss(tokens, cells, background)
            loss = cell_loss if "ids" not in batch else self.config.cell_weight * cell_loss
        if "ids" in batch:
            logits, labels = self._logits(batch, seen)
            yes, no = self.tokenizer.convert_tokens_to_ids([YES, NO])
            is_answer = (labels == yes) | (labels == no)
            weights = 1 + (self.config.answer_weight - 1) * is_answer
            loss = loss + (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
            right = logits.argmax(-1) == labels
            log["rating" if batch["rating"] else "words"] = right[~is_answer].float().mean().item()
            if not batch["rating"]:
                log["yes_no"] = right[is_answer].float().mean().item()
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in self.adam.param_groups for p in g["params"]], 1.0)
        self.muon.step()
        self.adam.step()
        self.muon.zero_grad()
        self.adam.zero_grad()
        self.step += 1
        return log | {"loss": loss.item()}

    def _logits(self, batch: dict[str, Any], seen: Any) -> tuple[Tensor, Tensor]:
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
        return self.model.lm_head(out.last_hidden_state[wanted]), labels[wanted]


def _leave_this_core(_: int) -> None:
    """Let the process that draws pictures run on any core, though training itself may be pinned to one."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    os.nice(10)
    torch.set_num_threads(1)


def train(config: TrainConfig, work_dir: Path, out: Path, *, stop_after: int | None, save_every: int) -> None:
    """Train to the end (or `stop_after` steps), then write the model folder `out`."""
    work_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, work_dir)
    trainer.resume()
    last = config.tower_steps + config.steps
    stop = last if stop_after is None else min(last, trainer.step + stop_after)
    loader: DataLoader[dict[str, Any]] = DataLoader(
        Batches(config, trainer.tokenizer, trainer.step, stop), batch_size=None, num_workers=1, prefetch_factor=4,
        collate_fn=lambda batch: batch, worker_init_fn=_leave_this_core,
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
    parser.add_argument("--stop-after", type=int, default=None, help="stop after so many steps of this run")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    for name in ("steps", "tower_steps", "batch"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(TrainConfig, name))
    for name in ("muon_rate", "adam_rate"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(TrainConfig, name))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = TrainConfig(
        steps=args.steps, tower_steps=args.tower_steps, batch=args.batch, muon_rate=args.muon_rate,
        adam_rate=args.adam_rate,
    )  # fmt: skip
    train(config, args.work_dir, args.out, stop_after=args.stop_after, save_every=args.save_every)


if __name__ == "__main__":
    main()
