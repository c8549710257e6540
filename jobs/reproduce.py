"""A paper's tables as a Ray job: the command ``rayapp reproduce`` with its options.

``ray job submit --working-dir . -- python jobs/reproduce.py ...``
"""

from rayapp.cli import run_job

if __name__ == "__main__":
    run_job("reproduce")
