"""A small hardware profile."""

import pytest

from loraserve.cost.profile import Profile
from loraserve.testing.small_profile import small_profile


@pytest.fixture
def profile() -> Profile:
    return small_profile()
