"""Random models of real architectures, small enough to build in a test: Qwen3-VL, causal language models, a VAE.

Each function writes a folder that `from_pretrained` and vLLM load like any released model. The weights are random; the
tokenizers, chat template and preprocessors are complete.
"""

import json
from pathlib import Path
from typing import Any

from pipelines.core.config import ModelRef
from pipelines.core.model_prompts import (
    CAPTION_PROMPTS,
    unified_reward_answer,
    unified_reward_prompt,
    vqascore_question,
)

QWEN_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# The part of Qwen3-VL's own template that the protocols need: images and text in user turns, no tools.
QWEN_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}"
    "{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif 'text' in part -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

_CORPUS = (
    *CAPTION_PROMPTS.values(),
    vqascore_question("two red dogs left of a blue house on a green background"),
    unified_reward_prompt("three yellow stars and one purple cat"),
    unified_reward_answer(4.5, 3.25, 2.69),
    *(word for word in ("Yes", "No", "Yes.", "No.") for _ in range(8)),
)


def train_tokenizer(special_tokens: tuple[str, ...] = QWEN_SPECIAL_TOKENS, vocab_size: int = 512) -> Any:
    """Return a fast byte-level BPE tokenizer in which "Yes" and "No" are single tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens(list(special_tokens))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=special_tokens[2] if len(special_tokens) > 2 else special_tokens[0],
        pad_token=special_tokens[0],
        clean_up_tokenization_spaces=False,
    )


def write_qwen3_vl(folder: Path, *, seed: int = 0, image_px: int = 64) -> ModelRef:
    """Write a random Qwen3-VL (0.2 M parameters) that resizes images to `image_px` squares; return its reference."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = train_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in QWEN_SPECIAL_TOKENS}
    config = Qwen3VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
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
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = Qwen3VLForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:  # the default std of 0.02 gives near-flat logits, where noise decides the argmax
                torch.nn.init.normal_(parameter, std=0.15)
    finally:
        torch.random.set_rng_state(generator_state)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.chat_template = QWEN_CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    _write_preprocessors(folder, image_px)
    return local_ref("tiny-qwen3-vl", folder)


def _write_preprocessors(folder: Path, image_px: int) -> None:
    shared = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": image_px * image_px, "longest_edge": image_px * image_px},
        "processor_class": "Qwen3VLProcessor",
    }
    image = shared | {"image_processor_type": "Qwen2VLImageProcessorFast"}
    video = shared | {"video_processor_type": "Qwen3VLVideoProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))


def write_causal_lm(folder: Path, *, family: str = "llama", seed: int = 0, num_layers: int = 4) -> ModelRef:
    """Write a random causal language model of `family` "llama" (like SmolLM2) or "qwen3" (with q/k norm)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    tokenizer = train_tokenizer()
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "llama":
            model = LlamaForCausalLM(LlamaConfig(**sizes))
        elif family == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**sizes))
        else:
            raise ValueError(f"family {family!r} is unknown; known: llama, qwen3")
        for name, parameter in model.named_parameters():
            # Norm weights other than one and nonzero biases, so that a test notices if one is left out.
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return local_ref(f"tiny-{family}", folder)


def write_autoencoder(folder: Path, *, seed: int = 0, latent_channels: int = 4) -> ModelRef:
    """Write a random AutoencoderKL (f4, SD3-like: no quant convolutions, with a shift factor)."""
    import torch
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=4,
            scaling_factor=1.5,
            shift_factor=0.06,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
        )
    model.save_pretrained(folder)
    return local_ref("tiny-vae", folder)


def local_ref(name: str, folder: Path) -> ModelRef:
    """Return the reference of a model folder, with the digest of its weights as revision."""
    from pipelines.core.digest import file_sha256

    weights = next(iter(sorted(folder.glob("*.safetensors"))))
    return ModelRef(id=name, revision=f"sha256:{file_sha256(weights)}", path=str(folder))
