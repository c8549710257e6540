"""What the benchmark of autoscaling compares: policies of other systems, as we read them."""
