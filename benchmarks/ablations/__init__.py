"""The studies of ``benchmarks/ablation.py``."""
