"""The stored inputs of training: hidden states of a frozen text encoder, and latents."""
