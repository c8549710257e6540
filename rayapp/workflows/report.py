"""The report of a plan that was just written, wherever that is."""

from __future__ import annotations

import logging

from rayapp.errors import DataError
from rayapp.evaluation.report.findings import gathered, stored_files
from rayapp.evaluation.report.page import REPORT_FILE, render_report
from rayapp.plan import PruningPlan
from rayapp.pruning.storage import Storage

logger = logging.getLogger(__name__)


def refresh_report(storage: Storage, plan: PruningPlan, front: Storage | None = None) -> None:
    """Write ``report.html`` from all that lies beside a plan, and beside its front.

    Another file of the directory that is damaged is named in the log, and there is no new report:
    the plan is written, and a search that succeeded shall not fail by that.

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
