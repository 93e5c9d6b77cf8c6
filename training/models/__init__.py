"""Model code in plain PyTorch: fusion strategies, the DiT, FuseDiT, their layers, and the time head."""
