"""Judges: vision-language models that grade completions."""
