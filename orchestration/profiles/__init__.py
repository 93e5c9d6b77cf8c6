"""Profiles: complete, validated configurations, and the pinning of the models that they name."""
