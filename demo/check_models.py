"""Measures the demo's shipped models on unseen scenes and compares each figure with its bar.

python -m demo.check_models [--scenes 400]
"""

import argparse
import io
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from demo.check_autoencoder import MIN_PSNR_DB
from demo.check_autoencoder import measure as measure_autoencoder
from demo.questions import SKILLS, Statement, changed_caption, statement
from demo.scenes import Scene, caption, render, sample_scene
from demo.train_vlm import degrade
from demo.vlm_model import PROMPT_VERSION
from pipelines.core.model_prompts import NO, YES, caption_prompt, unified_reward_prompt, vqascore_question

MODELS = Path(__file__).parent / "models"
UNSEEN_SEED = 1_000_003
"""Training seeds its streams with (seed, step) pairs; a single number gives different ones."""
CAPTION_BAR, YES_NO_BAR, STYLE_BAR = 0.85, 0.92, 0.9


@dataclass(frozen=True)
class BarCheck:
    """A figure and its bar."""

    name: str
    value: float
    bar: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.value >= self.bar


class GreedyModel:
    """The model in transformers with its own processor; decodes greedily."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

        self._torch = torch
        self._processor = AutoProcessor.from_pretrained(folder)
        self._processor.tokenizer.padding_side = "left"
        self._model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self._yes, self._no = self._processor.tokenizer.convert_tokens_to_ids([YES, NO])

    def _inputs(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Any:
        template = self._processor.apply_chat_template
        chats = [
            template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
                add_generation_prompt=True,
            )
            for text in texts
        ]
        return self._processor(text=chats, images=list(images), padding=True, return_tensors="pt")

    def answers(self, images: Sequence[Image.Image], texts: Sequence[str], max_tokens: int) -> list[str]:
        """Return the greedy answer for each image and text."""
        answers: list[str] = []
        for i in range(0, len(texts), 50):
            inputs = self._inputs(images[i : i + 50], texts[i : i + 50])
            with self._torch.inference_mode():
                out = self._model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]
            answers += self._processor.batch_decode(new, skip_special_tokens=True)
        return answers

    def says_yes(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[bool]:
        """Return whether P(Yes) exceeds P(No) at the first answer token."""
        found: list[bool] = []
        for i in range(0, len(texts), 50):
            with self._torch.inference_mode():
                logits = self._model(**self._inputs(images[i : i + 50], texts[i : i + 50])).logits[:, -1]
            found += (logits[:, self._yes] > logits[:, self._no]).tolist()
        return found


def _jpeg_coded(image: Image.Image) -> Image.Image:
    """Return the image after JPEG coding at quality 95, as shards contain it."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def balanced_statements(rng: np.random.Generator, per_skill: int) -> list[tuple[Scene, Statement]]:
    """Return `per_skill` statements per skill, half of them true, each about a scene of its own.

    For the skills that a caption can test, some are whole captions, true or with one fact changed.
    """
    pairs: list[tuple[Scene, Statement]] = []
    counts: Counter[tuple[str, bool]] = Counter()
    while len(pairs) < per_skill * len(SKILLS):
        scene = sample_scene(rng)
        answer = bool(rng.random() < 0.5)
        item: Statement | None
        if rng.random() < 0.15:
            skill, text = changed_caption(scene, rng)
            item = Statement(skill=skill, text=caption(scene) if answer else text, answer=answer)
        else:
            item = statement(scene, str(rng.choice(SKILLS)), answer, rng)
        if item is not None and counts[item.skill, answer] < per_skill // 2:
            counts[item.skill, answer] += 1
            pairs.append((scene, item))
    return pairs


def measure_vlm(folder: Path, num_scenes: int) -> list[BarCheck]:
    """Return the share of exact captions, Yes/No accuracy (also by skill), and the style score's rank correlation."""
    from scipy.stats import spearmanr

    rng = np.random.default_rng(UNSEEN_SEED)
    model = GreedyModel(folder)
    scenes = [sample_scene(rng) for _ in range(num_scenes)]
    images = [_jpeg_coded(render(scene)) for scene in scenes]
    captions = model.answers(images, [caption_prompt(PROMPT_VERSION)] * num_scenes, 48)
    exact = float(np.mean([text == caption(scene) for text, scene in zip(captions, scenes, strict=True)]))

    judged = balanced_statements(rng, max(20, num_scenes // 4))
    views = [_jpeg_coded(render(scene)) for scene, _ in judged]
    verdicts = model.says_yes(views, [vqascore_question(item.text) for _, item in judged])
    correct = [verdict == item.answer for verdict, (_, item) in zip(verdicts, judged, strict=True)]
    by_skill = {
        skill: float(np.mean([ok for ok, (_, item) in zip(correct, judged, strict=True) if item.skill == skill]))
        for skill in SKILLS
    }

    severities = rng.random(num_scenes)
    degraded = [degrade(render(scene), float(s), rng) for scene, s in zip(scenes, severities, strict=True)]
    rated = model.answers(degraded, [unified_reward_prompt(caption(scene)) for scene in scenes], 32)
    matches = [re.search(r"Style Score \(1-5\): ([1-5]\.\d\d)$", text) for text in rated]
    styles = [float(match[1]) if match else 3.0 for match in matches]
    return [
        BarCheck("captions exactly right", exact, CAPTION_BAR),
        BarCheck(
            "Yes/No accuracy", float(np.mean(correct)), YES_NO_BAR,
            "  ".join(f"{skill} {value:.3f}" for skill, value in by_skill.items()),
        ),
        BarCheck(
            "style score against degradation (-Spearman)", -float(spearmanr(styles, severities)[0]), STYLE_BAR,
            f"{sum(match is None for match in matches)} unreadable, counted as 3",
        ),
    ]  # fmt: skip


def main() -> None:
    """Print each figure with its bar; exit with status 1 if one is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=400, help="unseen scenes per measure")
    parser.add_argument("--vlm", type=Path, default=MODELS / "vlm")
    parser.add_argument("--autoencoder", type=Path, default=MODELS / "vae")
    args = parser.parse_args()
    psnr = measure_autoencoder(args.autoencoder, num_scenes=min(64, args.scenes)).mean_psnr_db
    checks = [*measure_vlm(args.vlm, args.scenes), BarCheck("autoencoder PSNR in dB", psnr, MIN_PSNR_DB)]
    for item in checks:
        print(f"{'ok  ' if item.passed else 'MISS'} {item.name}: {item.value:.4f} (bar {item.bar}) {item.detail}")
    sys.exit(0 if all(item.passed for item in checks) else 1)


if __name__ == "__main__":
    main()
