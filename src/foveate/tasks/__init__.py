"""Training and prediction on an existing trainer."""
