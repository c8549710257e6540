"""A pruning search as a Ray job: the command ``rayapp prune`` with its options.

``ray job submit --working-dir . -- python jobs/prune.py ...``
"""

from rayapp.cli import run_job

if __name__ == "__main__":
    run_job("prune")
