"""Measures the demo's shipped models on scenes they never saw, and says whether each meets its bar.

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
from demo.questions import SKILLS, Question, changed_caption, question
from demo.scenes import Scene, caption, render, sample_scene
from demo.train_vlm import degrade
from demo.vlm_model import PROMPT_VERSION
from pipelines.core.model_prompts import NO, YES, caption_prompt, unified_reward_prompt, vqascore_question

MODELS = Path(__file__).parent / "models"
UNSEEN_SEED = 1_000_003
"""Training draws from the pair (seed, step); no such stream starts here."""
CAPTION_BAR, YES_NO_BAR, STYLE_BAR = 0.85, 0.92, 0.9


@dataclass(frozen=True)
class Measured:
    """One figure beside its bar."""

    name: str
    value: float
    bar: float
    detail: str = ""

    @property
    def holds(self) -> bool:
        return self.value >= self.bar


class Asker:
    """The model through transformers and its own processor, greedy."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

        self._torch = torch
        self._processor = AutoProcessor.from_pretrained(folder)
        self._processor.tokenizer.padding_side = "left"
        self._model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self._yes, self._no = self._processor.tokenizer.convert_tokens_to_ids([YES, NO])

    def _inputs(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> Any:
        template = self._processor.apply_chat_template
        chats = [
            template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
                add_generation_prompt=True,
            )
            for text in texts
        ]
        return self._processor(text=chats, images=list(pictures), padding=True, return_tensors="pt")

    def answers(self, pictures: Sequence[Image.Image], texts: Sequence[str], max_tokens: int) -> list[str]:
        """Return the greedy answer for each picture and text."""
        found = []
        for i in range(0, len(texts), 50):
            inputs = self._inputs(pictures[i : i + 50], texts[i : i + 50])
            with self._torch.inference_mode():
                out = self._model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]
            found += self._processor.batch_decode(new, skip_special_tokens=True)
        return found

    def says_yes(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> list[bool]:
        """Return whether P(Yes) exceeds P(No) at the first answer token."""
        found: list[bool] = []
        for i in range(0, len(texts), 50):
            with self._torch.inference_mode():
                logits = self._model(**self._inputs(pictures[i : i + 50], texts[i : i + 50])).logits[:, -1]
            found += (logits[:, self._yes] > logits[:, self._no]).tolist()
        return found


def _as_shared(picture: Image.Image) -> Image.Image:
    """Return the picture as a shard holds it: JPEG, quality 95."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def balanced_questions(rng: np.random.Generator, per_skill: int) -> list[tuple[Scene, Question]]:
    """Return `per_skill` questions of each skill, half true, half false, each about a scene of its own.

    A third of them are whole captions, true or with one thing changed, for the skills a caption can test.
    """
    found: list[tuple[Scene, Question]] = []
    counts: Counter[tuple[str, bool]] = Counter()
    while len(found) < per_skill * len(SKILLS):
        scene = sample_scene(rng)
        answer = bool(rng.random() < 0.5)
        item: Question | None
        if rng.random() < 0.15:
            skill, text = changed_caption(scene, rng)
            item = Question(skill=skill, text=caption(scene) if answer else text, answer=answer)
        else:
            item = question(scene, str(rng.choice(SKILLS)), answer, rng)
        if item is not None and counts[item.skill, answer] < per_skill // 2:
            counts[item.skill, answer] += 1
            found.append((scene, item))
    return found


def measure_vlm(folder: Path, num_scenes: int) -> list[Measured]:
    """Return captions exactly right, Yes/No accuracy (and by skill), and the style score's rank correlation."""
    from scipy.stats import spearmanr

    rng = np.random.default_rng(UNSEEN_SEED)
    asker = Asker(folder)
    scenes = [sample_scene(rng) for _ in range(num_scenes)]
    pictures = [_as_shared(render(scene)) for scene in scenes]
    said = asker.answers(pictures, [caption_prompt(PROMPT_VERSION)] * num_scenes, 48)
    exact = float(np.mean([text == caption(scene) for text, scene in zip(said, scenes, strict=True)]))

    asked = balanced_questions(rng, max(20, num_scenes // 4))
    views = [_as_shared(render(scene)) for scene, _ in asked]
    yes = asker.says_yes(views, [vqascore_question(item.text) for _, item in asked])
    right = [told == item.answer for told, (_, item) in zip(yes, asked, strict=True)]
    by_skill = {
        skill: float(np.mean([ok for ok, (_, item) in zip(right, asked, strict=True) if item.skill == skill]))
        for skill in SKILLS
    }

    severities = rng.random(num_scenes)
    worn = [degrade(render(scene), float(s), rng) for scene, s in zip(scenes, severities, strict=True)]
    rated = asker.answers(worn, [unified_reward_prompt(caption(scene)) for scene in scenes], 32)
    found = [re.search(r"Style Score \(1-5\): ([1-5]\.\d\d)$", text) for text in rated]
    styles = [float(match[1]) if match else 3.0 for match in found]
    return [
        Measured("captions exactly right", exact, CAPTION_BAR),
        Measured(
            "Yes/No accuracy", float(np.mean(right)), YES_NO_BAR,
            "  ".join(f"{skill} {value:.3f}" for skill, value in by_skill.items()),
        ),
        Measured(
            "style score against degradation (-Spearman)", -float(spearmanr(styles, severities)[0]), STYLE_BAR,
            f"{sum(match is None for match in found)} unreadable, counted as 3",
        ),
    ]  # fmt: skip


def main() -> None:
    """Print each figure beside its bar; exit status 1 where one is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=400, help="unseen scenes per measure")
    parser.add_argument("--vlm", type=Path, default=MODELS / "vlm")
    parser.add_argument("--autoencoder", type=Path, default=MODELS / "vae")
    args = parser.parse_args()
    psnr = measure_autoencoder(args.autoencoder, num_scenes=min(64, args.scenes)).mean_psnr_db
    measured = [*measure_vlm(args.vlm, args.scenes), Measured("autoencoder PSNR in dB", psnr, MIN_PSNR_DB)]
    for item in measured:
        print(f"{'ok  ' if item.holds else 'MISS'} {item.name}: {item.value:.4f} (bar {item.bar}) {item.detail}")
    sys.exit(0 if all(item.holds for item in measured) else 1)


if __name__ == "__main__":
    main()
