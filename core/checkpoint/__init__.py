"""Checkpoints: shards, adapters, merging, and the released layout in and out."""
