"""Compares the answers of two or more evaluations, paired by question."""
