"""Rows: their schema, reading and writing."""
