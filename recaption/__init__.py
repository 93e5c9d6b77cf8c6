"""Captions: prompts by version, the vision-language engines, the Ray pool that scales them, caption checks."""
