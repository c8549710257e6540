"""A training of the text test-bed: the command ``rayapp train-testbed`` with its options.

``ray job submit --working-dir . -- python jobs/train_testbed.py ...``
"""

from rayapp.cli import run_job

if __name__ == "__main__":
    run_job("train-testbed")
