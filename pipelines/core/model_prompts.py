"""The exact prompts sent to models: caption prompts by version, the VQAScore question, the UnifiedReward rating.

They are contracts: a model's answer is only meaningful together with its prompt. The captioner, the judges and the
small demo models, which are trained on these exact words, all take them from here. In every protocol the image comes
first and the text second.
"""

from collections.abc import Mapping
from types import MappingProxyType

# Never edit a version; add a new one instead. Captions record the version of their prompt.
CAPTION_PROMPTS: Mapping[str, str] = MappingProxyType(
    {
        "brief-1": "Describe this image.",
        "dense-1": (
            "Write one dense caption for this image, as a single paragraph of plain prose. Name every visible object "
            "with its number, colour, material and position relative to the others, then the setting, the lighting "
            "and the style. Transcribe legible text in quotation marks. State only what can be seen; do not guess, "
            "do not address the reader, and do not begin with words such as 'The image shows'."
        ),
    }
)

YES = "Yes"
NO = "No"


def vqascore_question(prompt: str) -> str:
    """Return the question whose first answer token's P("Yes") is the VQAScore of an image for `prompt`.

    Source: VQAScore (arXiv 2404.01291), the protocol GenAI-Bench (arXiv 2406.13743) scores images with.
    """
    return f'Does this figure show "{prompt}"? Please answer Yes or No.'


RATING_AXES = ("Alignment", "Coherence", "Style")


def unified_reward_prompt(prompt: str) -> str:
    """Return the point-score request of UnifiedReward-2.0 (arXiv 2503.05236) for an image made from `prompt`.

    The answer holds one line per axis of `RATING_AXES`, such as ``Style Score (1-5): 2.69``.
    """
    return (
        "You are presented with a generated image and its associated text caption. Your task is to analyze the image "
        "across multiple dimensions in relation to the caption. Specifically:\n\n"
        "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
        "- Alignment Score: How well the image matches the caption in terms of content.\n"
        "- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, "
        "etc.).\n"
        "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.\n\n"
        "Output your evaluation using the format below:\n\n"
        "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\n"
        f"Your task is provided below.\nText Caption: [{prompt}]"
    )


def unified_reward_answer(alignment: float, coherence: float, style: float) -> str:
    """Return an answer in UnifiedReward-2.0's format, scores from 1 to 5 with two decimals."""
    return (
        f"Alignment Score (1-5): {alignment:.2f}\nCoherence Score (1-5): {coherence:.2f}\n"
        f"Style Score (1-5): {style:.2f}"
    )


def caption_prompt(version: str) -> str:
    """Return the caption prompt of `version`; raises ValueError, listing the known versions, if there is none."""
    if version not in CAPTION_PROMPTS:
        raise ValueError(f"caption prompt version {version!r} is unknown; known: {', '.join(sorted(CAPTION_PROMPTS))}")
    return CAPTION_PROMPTS[version]
