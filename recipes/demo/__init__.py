"""The demo: the whole chain on a tiny core, panels of real handwritten digits, and an exact thinking judge."""
