"""Counts the resources that a recipe needs before anything runs."""
