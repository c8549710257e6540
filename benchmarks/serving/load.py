"""Numbers of a server under load, from the replies that a client got."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from serving.client import Reply


def load_numbers(
    replies: Sequence[Reply], span_s: float, *, ttft_limit_s: float, tpot_limit_s: float
) -> dict[str, Any]:
    """Throughput, waits and goodput.

    Args:
        replies: The replies to all requests.
        span_s: Seconds from the first request to the last token.
        ttft_limit_s: Longest wait for the first token of a good answer.
        tpot_limit_s: Most seconds per further token of a good answer.
    """
    whole = [reply for reply in replies if reply.error is None and reply.first_s is not None]
    good = [
        reply
        for reply in whole
        if (reply.first_s or 0.0) <= ttft_limit_s and (reply.per_token_s or 0.0) <= tpot_limit_s
    ]
    numbers: dict[str, Any] = {
        "requests": len(replies),
        "failed": len(replies) - len(whole),
        "other_length": sum(r.num_counted not in (None, r.num_answer) for r in whole),
        "errors": sorted({reply.error for reply in replies if reply.error})[:3],
        "span_s": span_s,
        "tokens_per_s": sum(reply.num_answer for reply in whole) / span_s,
        "goodput_per_s": len(good) / span_s,
    }
    numbers |= _percentiles("ttft", [reply.first_s for reply in whole])
    numbers |= _percentiles("itl", [gap_s for reply in whole for gap_s in reply.gaps_s])
    return numbers | _percentiles("tpot", [reply.per_token_s for reply in whole])


def _percentiles(name: str, seconds: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in seconds if value is not None]
    return {
        f"{name}_p{share}_s": float(np.percentile(known, share)) if known else None
        for share in (50, 99)
    }
