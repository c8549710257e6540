"""The frame of all benchmarks: options, origins of numbers, and result files and pages.

A script says what it measures. :func:`recorder.run.run` parses its options, lets it measure, and
writes a record (JSON): the options, the origin (machine, versions, commit, date, load), and the
results. The page (Markdown) and its drawings (SVG) are made from the record alone.

Invariant: a page shows nothing that its record does not hold, so ``--render`` makes every page
again, and a test does so with all committed results. Rejected: pages written from the variables of
the run. They could be mended by hand only, or by measuring again.
"""
