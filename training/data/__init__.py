"""What a training step reads: the order of samples, latents, stored or freshly encoded text features."""
