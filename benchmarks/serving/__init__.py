"""What benchmarks of a running service share."""
