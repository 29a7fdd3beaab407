"""A run's figures: read, drawn, and written as one page."""
