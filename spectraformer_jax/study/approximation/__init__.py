"""How far each map is from exact attention, on any queries and keys."""
