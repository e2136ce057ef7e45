"""Scripts that measure; each prints a table and can write it as CSV."""
