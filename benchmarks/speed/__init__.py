"""The speed of searches and of evaluations on a model of real size."""
