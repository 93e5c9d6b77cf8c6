"""The demo's vision-language model: tokenizer, configuration, preprocessors, sequence packing.

The model is transformers' own Qwen3-VL with Qwen's chat template and special tokens, so vLLM serves it unchanged.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from demo.questions import changed_caption, statements
from demo.scenes import caption, sample_scene
from demo.sprites import COLOURS, NOUNS
from pipelines.core.model_prompts import (
    CAPTION_PROMPTS,
    NO,
    YES,
    unified_reward_answer,
    unified_reward_prompt,
    vqascore_question,
)

IMAGE_PX = 64
PATCH_PX, MERGE = 8, 2
GRID = IMAGE_PX // (PATCH_PX * MERGE)
NUM_IMAGE_TOKENS = GRID * GRID
PROMPT_VERSION = "brief-1"

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part.type == 'video' or 'video' in part -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- elif 'text' in part -%}{{- part.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
END_OF_USER = "<|im_end|>\n<|im_start|>assistant\n"
PREFIX = "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * NUM_IMAGE_TOKENS + "<|vision_end|>"


def phrase_tokens() -> list[str]:
    """Return the protocols' fixed phrases, which become single tokens.

    A question then takes 14 tokens instead of 30 and a rating 40 instead of 200, which shortens training.
    """
    opening, closing = vqascore_question("|").split("|")
    rating_opening, rating_closing = unified_reward_prompt("|").split("|")
    answer = unified_reward_answer(1, 1, 1).split("1.00")
    return [
        opening,
        closing,
        rating_opening,
        rating_closing,
        *(part for part in answer if part),
        *CAPTION_PROMPTS.values(),
    ]


def train_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer trained on the demo's vocabulary; it encodes unknown words as bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = np.random.default_rng(0)
    corpus: list[str] = []
    for _ in range(4000):
        scene = sample_scene(rng)
        corpus += [caption(scene), changed_caption(scene, rng)[1]]
        corpus += [vqascore_question(item.text) for item in statements(scene, rng)]
    for noun in NOUNS:
        corpus += [f"{colour} {noun}" for colour in COLOURS] * 2
    for hundredths in range(100, 501):
        corpus.append(unified_reward_answer(*[hundredths / 100] * 3))
    corpus += [unified_reward_prompt("a"), *CAPTION_PROMPTS.values(), YES, NO] * 50

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, min_frequency=20, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrase_tokens()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: Any, seed: int) -> Any:
    """Return the untrained model (about 3.6 M parameters) for 64 px images of 16 tokens each."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    config = Qwen3VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": 160,
            "intermediate_size": 480,
            "num_heads": 5,
            "patch_size": PATCH_PX,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": 160,
            "num_position_embeddings": (IMAGE_PX // PATCH_PX) ** 2,
            "deepstack_visual_indexes": [1, 2],
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 160,
            "intermediate_size": 448,
            "num_hidden_layers": 4,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": False,
            "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a folder that `from_pretrained` and vLLM load like any released Qwen3-VL, with float16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shared = {
        "patch_size": PATCH_PX,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": IMAGE_PX * IMAGE_PX, "longest_edge": IMAGE_PX * IMAGE_PX},
        "processor_class": "Qwen3VLProcessor",
    }
    image = shared | {"image_processor_type": "Qwen2VLImageProcessorFast"}
    video = shared | {"video_processor_type": "Qwen3VLVideoProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=1) + "\n")
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=1) + "\n")


def shrink(image: Image.Image) -> np.ndarray:
    """Return an image as the processor resizes it: bicubic to 64 px with antialiasing, uint8 (64, 64, 3)."""
    return np.asarray(image.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC))


def patches(images: np.ndarray) -> np.ndarray:
    """Convert uint8 (B, 64, 64, 3) to the processor's patch rows: float32 (B * 64, 3 * 2 * 8 * 8), in merge order."""
    x = (images.astype(np.float32) / 255.0 - 0.5) / 0.5
    b = len(x)
    x = x.reshape(b, GRID, MERGE, PATCH_PX, GRID, MERGE, PATCH_PX, 3).transpose(0, 1, 4, 2, 5, 7, 3, 6)
    x = np.repeat(x[:, :, :, :, :, :, None], 2, axis=6)
    return np.ascontiguousarray(x).reshape(b * (IMAGE_PX // PATCH_PX) ** 2, -1)


@dataclass(frozen=True)
class Turn:
    """The text after the image in one user turn, and the target answer."""

    text: str
    answer: str


class Packer:
    """Packs several independent turns about one image into one sequence.

    A turn attends to the image and itself, and its positions continue those of the image. To the model each turn equals
    a single-turn chat, but the image is computed only once.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        prefix = tokenizer(PREFIX, add_special_tokens=False)["input_ids"]
        self.prefix = np.array(prefix)
        image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.is_image = self.prefix == image_id
        self.prefix_positions, self.next_position = _prefix_positions(self.is_image)

    def pack(self, turns: list[list[Turn]]) -> dict[str, np.ndarray]:
        """Return ids, labels (B, S), positions (3, B, S), allowed (B, S, S) for B images; unlabelled is -100."""
        rows = [self._row(row) for row in turns]
        length = max(len(row[0]) for row in rows)
        length += -length % 8
        batch = len(rows)
        ids = np.zeros((batch, length), np.int64)
        labels = np.full((batch, length), -100, np.int64)
        segments = np.full((batch, length), -1, np.int64)
        positions = np.zeros((3, batch, length), np.int64)
        for i, (row_ids, row_labels, row_segments, row_positions) in enumerate(rows):
            n = len(row_ids)
            ids[i, :n], labels[i, :n], segments[i, :n] = row_ids, row_labels, row_segments
            positions[:, i, :n] = row_positions
        causal = np.tril(np.ones((length, length), bool))
        same = segments[:, :, None] == segments[:, None, :]
        allowed = causal & (same | (segments[:, None, :] == 0))
        return {"ids": ids, "labels": labels, "positions": positions, "allowed": allowed}

    def _row(self, turns: list[Turn]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        ids, labels = [self.prefix], [np.full(len(self.prefix), -100)]
        segments, positions = [np.zeros(len(self.prefix), np.int64)], [self.prefix_positions]
        for number, turn in enumerate(turns, 1):
            encode = self._tokenizer
            ask = encode(turn.text + END_OF_USER, add_special_tokens=False)["input_ids"]
            answer = encode(turn.answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
            n = len(ask) + len(answer)
            ids.append(np.array(ask + answer))
            labels.append(np.array([-100] * (len(ask) - 1) + answer + [-100]))
            segments.append(np.full(n, number))
            positions.append(np.broadcast_to(np.arange(n) + self.next_position, (3, n)))
        return np.concatenate(ids), np.concatenate(labels), np.concatenate(segments), np.concatenate(positions, 1)


def _prefix_positions(is_image: np.ndarray) -> tuple[np.ndarray, int]:
    """Return Qwen3-VL's (time, height, width) positions of a prefix with one image, and the next free position."""
    positions = np.zeros((3, len(is_image)), np.int64)
    position, cell = 0, 0
    for i, image in enumerate(is_image):
        if image:
            positions[:, i] = (position, position + cell // GRID, position + cell % GRID)
            cell += 1
            if cell == NUM_IMAGE_TOKENS:
                position += GRID
        else:
            positions[:, i] = position
            position += 1
    return positions, position
