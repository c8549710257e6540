"""The report of a plan that was just written, in a directory or another storage."""

from __future__ import annotations

import logging

from rayapp.errors import DataError
from rayapp.evaluation.report.findings import gathered, stored_files
from rayapp.evaluation.report.page import REPORT_FILE, render_report
from rayapp.plan import PruningPlan
from rayapp.pruning.storage import Storage

logger = logging.getLogger(__name__)


def refresh_report(storage: Storage, plan: PruningPlan, front: Storage | None = None) -> None:
    """Write ``report.html`` from all files beside a plan, and beside its front.

    If another file of the directory is damaged, the log names it and there is no new report: the
    plan is already written, and a search that succeeded shall not fail because of a report.

    Raises:
        SearchError: Writing failed.
    """
    root = stored_files(front) if front else None
    try:
        page = render_report(gathered(plan, stored_files(storage), root))
    except DataError as error:
        logger.warning("%s/%s is not written: %s", storage.location, REPORT_FILE, error)
        return
    storage.write_bytes(REPORT_FILE, page.encode())
