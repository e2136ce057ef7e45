"""Reads file and text formats without trust in their content."""
