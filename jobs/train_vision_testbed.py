"""A training of the vision test-bed: the command ``rayapp train-vision-testbed`` with its options.

``ray job submit --working-dir . -- python jobs/train_vision_testbed.py ...``
"""

from rayapp.cli import run_job

if __name__ == "__main__":
    run_job("train-vision-testbed")
