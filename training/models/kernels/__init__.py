"""The seam between the models' equations and what makes them fast on a particular machine."""
