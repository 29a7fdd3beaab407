"""Rollout workers: server processes, their client, weight updates and the parity guard."""
