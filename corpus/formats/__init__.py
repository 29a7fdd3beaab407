"""Public data formats as records: readers of files, one converter per family of rows, and the table that lists them."""
