"""Prompts and the images drawn for them: stages `prompt_sets` and `samples`, the published benchmark formats."""
