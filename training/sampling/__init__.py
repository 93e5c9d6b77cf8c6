"""Images from a checkpoint: the sampler, and the text side computed once for all of its steps."""
