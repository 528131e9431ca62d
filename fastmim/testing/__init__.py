"""For tests of runs that go wrong, of this project and of methods that others add."""
