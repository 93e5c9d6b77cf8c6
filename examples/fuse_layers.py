"""How each fusion strategy weighs the layers of a text encoder, over flow time and blocks.

python examples/fuse_layers.py
"""

import torch

from training.config import Strategy
from training.models.fusion import Fusion

LAYERS, BLOCKS, TOKENS, CHANNELS = 8, 4, 5, 16
generator = torch.Generator().manual_seed(0)
hidden_states = torch.randn(LAYERS, 1, TOKENS, CHANNELS, generator=generator)  # (L, B, N, C)

for strategy in Strategy:
    if strategy is Strategy.FUSE_DIT:
        continue  # its blocks attend to the encoder's own keys and values: no layer weights
    fusion = Fusion(strategy, num_layers=LAYERS, num_blocks=BLOCKS)
    for parameter in fusion.parameters():  # as if trained; a fresh model starts at the uniform average
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    weights = fusion.all_weights(torch.tensor([0.1, 0.9]))  # (V, B, L) at two flow times
    changes = (weights[:, 0] - weights[:, 1]).abs().max().item()
    conditioning = fusion(hidden_states, torch.tensor([0.5]), block_index=0)  # Eq. 2: (B, N, C)
    print(
        f"{strategy:12} {len(weights)} set(s) of {LAYERS} layer weights, "
        f"{'changing' if changes > 1e-3 else 'constant'} over time; H_cond {tuple(conditioning.shape)}"
    )
