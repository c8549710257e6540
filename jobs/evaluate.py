"""An evaluation as a Ray job: the command ``rayapp evaluate`` with its options.

``ray job submit --working-dir . -- python jobs/evaluate.py ...``
"""

from rayapp.cli import run_job

if __name__ == "__main__":
    run_job("evaluate")
