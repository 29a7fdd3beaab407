"""Rewards outside a run: score, diff, gold-answer tests, judge audits."""
