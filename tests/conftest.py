"""Settings that all tests share; its place also lets every test import the helpers that lie beside it."""

from hypothesis import settings

settings.register_profile("house", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("house")
