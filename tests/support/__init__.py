"""Libraries for the tests, for fuzzing and for soaks. No test is here, and no fixture."""
