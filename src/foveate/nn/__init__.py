"""Modules that know tokens, not files."""
