"""What training reads instead of words and pixels: hidden states of a frozen text encoder, and latents."""
