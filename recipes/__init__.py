"""Recipes and the console command that runs them: YAML values in, checkpoints and a report out."""
