"""Libraries for the tests, for fuzzing and for soaks, without any test or fixture."""
