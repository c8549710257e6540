"""Time and rates of the device that a benchmark runs on."""
