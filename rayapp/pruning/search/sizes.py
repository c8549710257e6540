"""How many blocks to remove per stage, to reach a target speed-up.

The costs are measured once per output directory and kept beside the journal, so a search that is
resumed removes what it began with.
"""

from __future__ import annotations

import itertools
import logging

from rayapp.errors import InputError
from rayapp.pruning.measures.costs import Costs, measure_costs
from rayapp.pruning.scorer import Compute
from rayapp.pruning.search.journal import JOURNAL_FILE
from rayapp.pruning.settings.search import SearchSettings
from rayapp.pruning.storage import Storage

logger = logging.getLogger(__name__)

COSTS_FILE = "costs.json"


def kept_costs(storage: Storage, compute: Compute, *, begun: bool) -> Costs:
    """The costs that a ``begun`` search started with; for a new one, measure and keep them."""
    if begun and storage.exists(COSTS_FILE):
        return Costs.loads(storage.read_text(COSTS_FILE))
    costs = compute.measure(measure_costs)
    storage.write_bytes(COSTS_FILE, costs.dumps().encode())
    return costs


def with_sizes(settings: SearchSettings, compute: Compute) -> SearchSettings:
    """The settings with sizes that reach ``target_speedup``; unchanged if there is no target.

    Raises:
        InputError: No sizes reach it; the message names the most that can be reached.
    """
    if settings.target_speedup is None:
        return settings
    storage = Storage(settings.out)
    costs = kept_costs(storage, compute, begun=storage.exists(JOURNAL_FILE))
    prefill, decode = sizes_for(settings, costs, settings.target_speedup)
    logger.info(
        "a speed-up of %g at %d prompt and %d answer tokens: removing %g blocks from prefill and "
        "%g from decode, %.3g expected",
        settings.target_speedup,
        costs.prompt_tokens,
        costs.answer_tokens,
        prefill,
        decode,
        _expected(settings, costs, prefill, decode),
    )
    return settings.model_copy(update={"prefill_remove": prefill, "decode_remove": decode})


def sizes_for(settings: SearchSettings, costs: Costs, target: float) -> tuple[float, float]:
    """The fewest blocks whose removal is expected to reach ``target`` (project default).

    Of sizes with equally many blocks, those that are spread most evenly over the stages are taken,
    then the faster ones.
    """
    step = 0.5 if settings.unit == "part" else 1.0
    counts = [step * n for n in range(int(costs.num_blocks / step))]
    sizes = [pair for pair in itertools.product(counts, counts) if settings.fits(*pair)]
    speed_ups = {pair: _expected(settings, costs, *pair) for pair in sizes}
    reached = [pair for pair in sizes if speed_ups[pair] >= target]
    if not reached:
        raise InputError(
            f"target_speedup={target:g} cannot be reached: removing all blocks but one from each "
            f"stage is expected to give {max(speed_ups.values()):.3g}; ask for less"
        )
    return min(reached, key=lambda pair: (sum(pair), abs(pair[0] - pair[1]), -speed_ups[pair]))


def _expected(settings: SearchSettings, costs: Costs, prefill: float, decode: float) -> float:
    dense_s = costs.expected_s(0, 0, kv_modes=False)
    kv_modes = settings.kv_modes and not settings.shared
    bridged = settings.heals_linearly
    return dense_s / costs.expected_s(prefill, decode, kv_modes=kv_modes, bridged=bridged)
