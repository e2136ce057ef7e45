"""One training step: pure functions, no files and no devices."""
