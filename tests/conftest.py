"""Settings of all tests."""

import os
import tempfile

import pytest
from hypothesis import HealthCheck, settings

# a busy machine is no fault of a test
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(autouse=True, scope="session")
def _cache():
    """What is verified of datasets in temporary folders is not kept in the user's cache."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["STEREOVLA_CACHE"] = folder
        yield
