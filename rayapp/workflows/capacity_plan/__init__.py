"""Plans of capacity: stage costs that are measured here, and the replicas that a load needs."""
