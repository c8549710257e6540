"""All findings about one plan, gathered from its directory.

A file is used only if it belongs to this very plan: a plan directory can be searched again, get
other transfer rules, or be copied. Files that are left out are named, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rayapp.errors import DataError
from rayapp.evaluation.report.kv_findings import KVFindings, read_kv
from rayapp.evaluation.report.search_record import (
    FrontRow,
    TrialRow,
    read_front,
    read_json,
    read_trials,
    single_removals,
)
from rayapp.evaluation.result import EvaluationResult
from rayapp.evaluation.visual.result import VISUAL_FILE, VisualQuality
from rayapp.plan import STAGES, PruningPlan, Stage
from rayapp.pruning.kv_choice.record import KV_FILE
from rayapp.pruning.measures.influence import Influence
from rayapp.pruning.search.front import FRONT_FILE
from rayapp.pruning.search.journal import JOURNAL_FILE, journal_influence
from rayapp.pruning.search.sensitivity import SENSITIVITY_FILE, Sensitivity
from rayapp.pruning.search.trials import TRIALS_FILE
from rayapp.pruning.storage import Storage

EVALUATION_FILE = "evaluation.json"
LEDGER_FILE = "ledger.json"

Read = Callable[[str], bytes | None]
"""A function that reads a file of a directory; it gives None if there is no such file."""
LedgerJSON = Mapping[str, Any]
_SUMS = ("num_transfers", "bytes_full", "bytes_sent", "overhead_bytes")


@dataclass(frozen=True)
class SingleEffects:
    """Scores of one unit removed alone, by stage and unit; ``source`` names their origin."""

    stages: Mapping[Stage, Mapping[str, float]]
    source: str


@dataclass(frozen=True)
class Findings:
    """A plan and the findings about it; a missing finding is None or empty.

    Attributes:
        plan: The plan itself.
        evaluation: The evaluation of dense beside plan.
        ledger: The answer of ``GET /v1/transfers``.
        trials: The trials of the search that made the plan, in order.
        influence: The changes that blocks and parts make to the dense model's hidden state.
        influence_lines: Number of lines that the influence was measured on; None if not recorded.
        singles: The scores of single units removed alone.
        kv: The selection that chose the plan's transfer rules.
        front: Plans of all sizes, this one among them.
        left_out: Names of files that are not shown, with the reason.
        visual: The comparison of ways to prune visual tokens of the plan's model.
    """

    plan: PruningPlan
    evaluation: EvaluationResult | None = None
    ledger: LedgerJSON | None = None
    trials: tuple[TrialRow, ...] = ()
    influence: Influence | None = None
    influence_lines: int | None = None
    singles: SingleEffects | None = None
    kv: KVFindings | None = None
    front: tuple[FrontRow, ...] = ()
    left_out: tuple[str, ...] = ()
    visual: VisualQuality | None = None


def gather(
    path: str | Path, *, evaluation: str | Path | None = None, ledger: str | Path | None = None
) -> Findings:
    """Gather the findings in a plan directory, and in that of its front if it came from one.

    Args:
        path: The plan directory, or its ``plan.json``.
        evaluation: An evaluation's JSON; by default ``evaluation.json`` of the directory.
        ledger: A ledger's JSON; by default ``ledger.json`` of the directory.

    Raises:
        PlanError: There is no plan.
        DataError: A file is damaged, or ``evaluation`` is of another plan.
    """
    plan = PruningPlan.load(path)
    home = plan.directory
    assert home is not None, "a plan that was loaded has a directory"
    above = [home, home.parent, home.parent.parent]
    roots = [folder for folder in above if (folder / FRONT_FILE).is_file()]
    given = EvaluationResult.load(evaluation) if evaluation else None
    if given and not _is_of(given, plan):
        raise DataError(
            f"{evaluation}: evaluates plan {given.plan.fingerprint}, but {path} is plan "
            f"{plan.fingerprint}; evaluate this plan, or give the one that was evaluated"
        )
    sums = read_ledger(Path(ledger)) if ledger else None
    root = local_files(roots[0]) if roots else None
    return gathered(plan, local_files(home), root, evaluation=given, ledger=sums)


def gathered(
    plan: PruningPlan,
    home: Read,
    root: Read | None = None,
    *,
    evaluation: EvaluationResult | None = None,
    ledger: LedgerJSON | None = None,
) -> Findings:
    """Gather the findings in a plan's directory and in its front's, by reading functions.

    Args:
        plan: The plan.
        home: Reads its directory.
        root: Reads the directory of its front, if it came from one.
        evaluation: An evaluation that replaces the directory's own.
        ledger: A ledger that replaces the directory's own.

    Raises:
        DataError: A file is damaged.
    """
    files = _Gathering(plan, home, root)
    visual = files.visual()
    return Findings(
        plan,
        evaluation or files.evaluation(),
        ledger or files.ledger(),
        files.trials(),
        *files.influence(),
        files.singles(),
        files.kv(),
        files.front,
        tuple(files.left_out),
        visual,
    )


def local_files(directory: Path) -> Read:
    """A reader of files of a local directory, which is never written."""

    def read(name: str) -> bytes | None:
        try:
            return (directory / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(
                f"{directory / name}: cannot be read ({error.strerror}); make it readable, or move "
                "it away"
            ) from None

    return read


def stored_files(storage: Storage) -> Read:
    """A reader of files of a search's output directory, wherever that is."""
    return lambda name: storage.read_bytes(name) if storage.exists(name) else None


def read_ledger(path: Path) -> LedgerJSON:
    """Read a file with the answer of ``GET /v1/transfers``; raises :class:`DataError`."""
    try:
        return _ledger(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); give a file that `rayapp transfers "
            "--json` wrote"
        ) from None


def _ledger(content: bytes, where: str) -> LedgerJSON:
    what = "what `rayapp transfers --json` prints"
    ledger: LedgerJSON = read_json(content, where, what)
    totals, links = ledger.get("totals"), ledger.get("links", [])
    rows = [totals, *links] if isinstance(links, list) else [None]
    for row in rows:
        whole = isinstance(row, dict) and all(isinstance(row.get(key), int) for key in _SUMS)
        if not whole:
            raise DataError(f"{where}: is no ledger (sums of bytes are missing); give {what}")
    return ledger


def _is_of(evaluation: EvaluationResult, plan: PruningPlan) -> bool:
    return evaluation.plan.fingerprint == plan.fingerprint


class _Gathering:
    """Reads the files of a plan, kind by kind, and collects the names of those left out."""

    def __init__(self, plan: PruningPlan, home: Read, root: Read | None) -> None:
        self._plan, self._home, self._root = plan, home, root
        self.front: tuple[FrontRow, ...] = ()
        self._searches = [home]
        if root is not None:
            self._read_front(root)
        self.left_out: list[str] = []

    def _read_front(self, root: Read) -> None:
        """Read the front and the searches behind it, if the plan is one of the front's plans."""
        rows = read_front(root(FRONT_FILE) or b"[]", FRONT_FILE)
        if not any(row.is_of(self._plan) for row in rows):
            return
        self.front = rows
        sizes = dict.fromkeys(row.size for row in rows)
        mine = tuple(self._plan.removed(stage) for stage in STAGES)
        self._searches += [
            _inside(root, f"sizes/prefill-{prefill:g}-decode-{decode:g}")
            for prefill, decode in [mine, *sizes]
        ]

    def _leave_out(self, name: str, why: str) -> None:
        self.left_out.append(f"{name}: {why}")

    def evaluation(self) -> EvaluationResult | None:
        content = self._home(EVALUATION_FILE)
        if content is None:
            return None
        result = EvaluationResult.parse(content, source=EVALUATION_FILE)
        if _is_of(result, self._plan):
            return result
        self._leave_out(EVALUATION_FILE, f"evaluates another plan ({result.plan.fingerprint})")
        return None

    def ledger(self) -> LedgerJSON | None:
        content = self._home(LEDGER_FILE)
        return None if content is None else _ledger(content, LEDGER_FILE)

    def trials(self) -> tuple[TrialRow, ...]:
        """The trials of the first search that scored the plan."""
        seen = False
        for search in self._searches:
            rows = self._trials_of(search)
            seen = seen or bool(rows)
            if any(row.is_of(self._plan) for row in rows):
                return rows
        if seen:
            self._leave_out(TRIALS_FILE, "this plan is none of the candidates scored in it")
        return ()

    def _trials_of(self, search: Read) -> tuple[TrialRow, ...]:
        content = search(TRIALS_FILE)
        return () if content is None else read_trials(content, TRIALS_FILE)

    @cached_property
    def _measured(self) -> Sensitivity | None:
        content = self._home(SENSITIVITY_FILE)
        if content is None and self._root is not None:
            content = self._root(SENSITIVITY_FILE)
        sensitivity = None if content is None else Sensitivity.parse(content)
        model = self._plan.model
        if sensitivity and model and sensitivity.weights == model.weights_fingerprint:
            return sensitivity
        if content is not None:
            self._leave_out(SENSITIVITY_FILE, "is damaged, or of another model")
        return None

    def influence(self) -> tuple[Influence | None, int | None]:
        """The influence from a journal, or measured for the report; and its number of lines."""
        for search in self._searches:
            journal = search(JOURNAL_FILE)
            recorded = journal and journal_influence(journal.decode(errors="replace"))
            if recorded:
                lines = self._plan.provenance.get("num_lines")
                return recorded, lines if isinstance(lines, int) else None
        measured = self._measured
        return (measured.influence, measured.num_lines) if measured else (None, None)

    def singles(self) -> SingleEffects | None:
        """The scores of single units, measured for the report or among the searches' trials."""
        measured = self._measured
        if measured and measured.singles:
            stages = {
                stage: {str(b): score for b, score in enumerate(measured.singles.stage(stage))}
                for stage in STAGES
            }
            return SingleEffects(stages, f"measured on {measured.num_lines:,} calibration lines")
        scores: dict[Stage, dict[str, float]] = {}
        for search in self._searches:
            for stage, units in single_removals(self._trials_of(search)).items():
                scores[stage] = {**units, **scores.get(stage, {})}
        return SingleEffects(scores, "scored by the search") if scores else None

    def kv(self) -> KVFindings | None:
        content = self._home(KV_FILE)
        if content is None:
            return None
        selection = read_kv(content, KV_FILE)
        if selection.is_of(self._plan):
            return selection
        why = "is of another plan" if selection.complete else "the selection did not finish"
        self._leave_out(KV_FILE, why)
        return None

    def visual(self) -> VisualQuality | None:
        content = self._home(VISUAL_FILE)
        if content is None:
            return None
        comparison = VisualQuality.parse(content, VISUAL_FILE)
        if comparison.is_of(self._plan):
            return comparison
        self._leave_out(VISUAL_FILE, "is of another model")
        return None


def _inside(read: Read, folder: str) -> Read:
    return lambda name: read(f"{folder}/{name}")
