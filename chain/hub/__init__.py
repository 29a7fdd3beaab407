"""Checkpoints to the hub with a model card, and cores from the hub."""
