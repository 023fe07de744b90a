"""Measurements: what they cost and what they say is printed by each script, never assumed."""
