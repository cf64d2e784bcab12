"""The settings of hypothesis for all tests in this folder."""
from hypothesis import settings

settings.register_profile("extras", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("extras")
