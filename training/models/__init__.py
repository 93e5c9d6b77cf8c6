"""The models as equations in plain PyTorch (fusion, DiT, FuseDiT, flow matching) and their saved form."""
