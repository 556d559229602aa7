"""Settings of all tests."""

from hypothesis import HealthCheck, settings

# a busy machine is no fault of a test
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
