"""File and text formats, read without trust in their content."""
