"""The removals of a plan that exists, healed in closed form, in this process or on Ray."""

from __future__ import annotations

import time

from rayapp.data.seen import Seen
from rayapp.errors import InputError
from rayapp.models.hub import from_directory
from rayapp.plan import PruningPlan
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.candidates.healing import Healing
from rayapp.pruning.preparation import located, prepare_scoring
from rayapp.pruning.search.written_plan import write_plan
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.pruning.settings.search import SearchSettings
from rayapp.pruning.storage import Storage
from rayapp.workflows.scorer import opened_scorer


def heal_plan(
    score: ScoreSettings, compute: ComputeSettings, search: SearchSettings, plan: PruningPlan
) -> PruningPlan:
    """Solve the linear maps that stand for a plan's removals, and write the healed plan.

    Nothing is searched: the plan keeps its removals, its first token and its visual tokens, and
    loses its transfer rules, which were chosen without healing. It is scored once.

    Args:
        score: The score, whose objective follows the plan.
        compute: The place of computation.
        search: Healing, heal data and output directory; sizes and method do not count.
        plan: The plan whose removals are healed.

    Raises:
        InputError: ``search`` does not heal by linear maps alone, or model or data cannot be used.
        ClusterError: The cluster cannot be reached, or cannot place an evaluator.
        SearchError: A map cannot be solved or written.
    """
    search.check_healing()
    if search.heal != "linear":
        raise InputError(
            f"heal={search.heal}: removals of a plan that exists are healed by linear maps alone; "
            "use --heal linear"
        )
    began_s = time.monotonic()
    score = located(score).following(plan)
    prepared = prepare_scoring(score, compute, search.heal_data)
    signature = prepared.signature
    plan.check_model(signature)
    candidate = Candidate.from_plan(plan).with_kv({})
    healing = Healing(
        num_blocks=signature.num_blocks,
        linear=True,
        served=search.heal_states == "served",
        first_token=plan.first_token,
    )
    with opened_scorer(score, compute, prepared, search) as scorer:
        scorer.heal_with(healing)
        (scored,) = scorer.score_many([candidate])
        provenance = {
            **from_directory(score.model).provenance,
            "seen": Seen.of([score.calibration, search.heal_data]).model_dump(mode="json"),
            "settings": {"heal": search.heal, **score.identity},
            "healed_plan": plan.fingerprint,
            "num_lines": len(prepared.calibration.lines),
            "score": scored.value,
            "score_by_task": scored.tasks,
            "evaluations": 1,
            "seconds": round(time.monotonic() - began_s, 3),
        }
        healed = candidate.plan(
            signature,
            first_token=plan.first_token,
            visual_tokens=plan.visual_tokens,
            provenance=provenance,
        )
        return write_plan(Storage(search.out), healed, candidate, scorer)
