"""Files: they know boxes, not tokens."""
