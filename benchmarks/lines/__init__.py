"""Lines of the test-bed that benchmarks score candidates on, and resamples of them."""
