"""How long the fuzzing of this folder takes: seconds with fixed inputs in `make test`, minutes with new ones in
`make fuzz`."""

from hypothesis import HealthCheck, settings

# A test's own cache folder is not used by these tests, so it may stay the same for every input.
common = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.function_scoped_fixture,
                                                                        HealthCheck.too_slow]}  # fmt: skip
settings.register_profile("short", derandomize=True, max_examples=60, stateful_step_count=30, **common)
settings.register_profile("long", max_examples=5000, stateful_step_count=100, print_blob=True, **common)
settings.load_profile("short")
