"""The model card of an exported checkpoint: a README.md with its origin and its use."""

import json
from collections.abc import Mapping
from typing import Any

from pipelines.core.digest import LOCAL_PREFIX

_CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
license: other
tags:
- throughline
- {strategy}
---

# Text to image, strategy `{strategy}`

A diffusion transformer of {num_parameters:,} parameters over frozen text features, trained with Throughline. How the
layers of the text encoder are fused follows [Semantic Routing](https://arxiv.org/abs/2602.03510).

## Use

The package `throughline` must be installed; it brings the classes.

```python
from training.diffusers_pipeline import ThroughlinePipeline

pipe = ThroughlinePipeline.from_pretrained("path/to/this/folder")
pipe("three red cars on a wooden table").images[0].save("cars.png")
```

`DiffusionPipeline.from_pretrained("path/to/this/folder", trust_remote_code=True)` gives the same, and takes the id of a
repository on a hub too; the code it runs is the import in `pipeline.py`.

Defaults of a call: {num_inference_steps} steps, guidance {guidance_scale:g}{size}. {encoder_place}

## Lineage

| what | which |
|---|---|
{rows}

Every version is a digest of content: `throughline audit {checkpoint}` follows it back to the rows that were trained on,
where the data root is at hand. The consumption digest is that of the sample keys in the order of training; models with
equal digests saw the same samples in the same order.

Training settings:

```json
{training}
```

## Licence

The weights of the transformer were trained on pictures from the web and on captions made of them; whoever passes them
on answers for the rights in that data. Text encoder and autoencoder are other people's work under their own licences:
see {text_encoder_id} and {autoencoder_id}. The code is Apache-2.0.
"""


def model_card(lineage: Mapping[str, Any]) -> str:
    """Return the card's text for the result of `training.export.export.lineage_of`."""
    encoder, autoencoder = lineage["text_encoder"], lineage["autoencoder"]
    sampler, summary = lineage["sampler"], lineage["summary"]
    facts = {
        "strategy": lineage["strategy"],
        "checkpoint": lineage["checkpoint"],
        "dataset": lineage["dataset"],
        "text encoder": f"{encoder['id']} at {encoder['revision']}",
        "text template": lineage["template_version"],
        "autoencoder": f"{autoencoder['id']} at {autoencoder['revision']}",
        "consumption digest": summary.get("consumption_digest"),
        "samples seen": summary.get("num_samples_seen"),
        "steps": summary.get("steps"),
        "final loss": summary.get("final_loss"),
        "validation loss": summary.get("validation_loss"),
        "version of the training code": lineage["code_version"],
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value is not None)
    saved_in = "Encoder and autoencoder are in the folder."
    named = f"The text encoder is not in the folder: {encoder['id']} is loaded from the hub at the first call."
    if encoder["revision"].startswith(LOCAL_PREFIX):
        named = (
            f"The text encoder is not in the folder and on no hub: give the folder that holds {encoder['id']} to "
            "`pipe.load_text_encoder(folder)` before the first call, which checks that its content is the one below."
        )
    return _CARD.format(
        strategy=lineage["strategy"],
        num_parameters=lineage["num_parameters"],
        num_inference_steps=sampler["num_steps"],
        guidance_scale=sampler["guidance_scale"],
        size=f", {lineage['size_px']} px",
        encoder_place=saved_in if encoder["saved_in"] else named,
        rows=rows,
        checkpoint=lineage["checkpoint"],
        training=json.dumps(lineage["training"], indent=1, sort_keys=True),
        text_encoder_id=encoder["id"],
        autoencoder_id=autoencoder["id"],
    )
