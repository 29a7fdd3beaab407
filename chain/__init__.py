"""Runs one recipe: the command `posttrain` and the orchestrator of the stages."""
