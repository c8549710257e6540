"""A selection of KV as a Ray job: the command ``rayapp kv-select`` with its options.

``ray job submit --working-dir . -- python jobs/kv_select.py ...``
"""

from rayapp.cli import run_job

if __name__ == "__main__":
    run_job("kv-select")
