"""The data of a training step: the order of samples, latents, stored or online text features."""
