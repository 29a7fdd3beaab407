"""The resources that a recipe needs, counted before anything runs."""
