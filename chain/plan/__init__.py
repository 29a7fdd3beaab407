"""What a recipe takes of a machine, told before anything runs."""
