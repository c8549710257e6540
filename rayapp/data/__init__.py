"""Lines of calibration, healing and evaluation files: plain, published benchmarks, images.

A file is read strictly: every bad line is named with its number before any model is run.
"""
