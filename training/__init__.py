"""Training and sampling: fusion strategies, DiT and FuseDiT, flow matching, the loop, data order, checkpoints."""
