"""Recaptioning: vision-language engines, the Ray pool that scales them, the stage `captions`, caption checks."""
