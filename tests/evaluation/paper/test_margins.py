from __future__ import annotations

import pytest

from rayapp.data.published_sets import IN_DOMAIN
from rayapp.evaluation.paper.numbers import MARGIN, decode_shares, margins, row_numbers
from rayapp.evaluation.paper.outcome import DataOutcome, Metric, RowOutcome
from rayapp.evaluation.result import MEAN


def outcome(dense: int, plan: int, norm: int = 0, *, chance: float = 25.0) -> DataOutcome:
    """A set of 200 questions, so many of them right."""

    def right(count: int) -> tuple[float, ...]:
        return (100.0,) * count + (0.0,) * (200 - count)

    return DataOutcome(
        sha256="0",
        kind="choices",
        metrics=(
            Metric(name="acc", dense=right(dense), plan=right(plan)),
            Metric(name="acc_norm", dense=right(norm), plan=right(norm)),
        ),
        num_prompts=200,
        min_prompt_tokens=9,
        bytes_full=2,
        bytes_sent=1,
        chance=(chance / 100,) * 200,
        keys=((0,) * 52 + tuple(range(1, 149)),),
        decode_share=0.9,
    )


def test_the_margin_above_chance_is_what_counts():
    data = {
        "good": outcome(150, 140),
        "guessed": outcome(60, 60),
        "letters": outcome(120, 110, 130),
        f"PIQA{IN_DOMAIN}": outcome(150, 100),
    }
    row = RowOutcome(name="any", plan="f", prefill_removed=1, decode_removed=0, data=data)
    kept = {number.data: number for number in margins(row, seed=0)}
    assert set(kept) == {"good", "letters", f"PIQA{IN_DOMAIN}", MEAN}, "30 % is not above 26 %"
    assert {number.metric for number in kept.values()} == {MARGIN}
    assert kept["good"].plan == pytest.approx(100 * (70 - 25) / (75 - 25))
    assert kept["letters"].plan == pytest.approx(100.0), "dense is better in acc_norm"
    assert kept[MEAN].plan == pytest.approx((90 + 100) / 2), "calibration domains stay apart"
    assert kept[MEAN].num == 400
    assert kept["good"].difference == pytest.approx(10.0)
    assert 10 < kept["good"].bound < 20, "at least 80 % is kept"


@pytest.mark.parametrize("only_decode", [False, True])
def test_a_row_of_decode_alone_leaves_out_what_prefill_answers(only_decode):
    word = outcome(150, 150).model_copy(update={"decode_share": 0.28})
    data = {"cloze": outcome(150, 140), "word": word}
    row = RowOutcome(
        name="any", plan="f", prefill_removed=0, decode_removed=2, data=data,
        only_decode=only_decode,
    )  # fmt: skip
    kept = {number.data: number for number in margins(row, seed=0)}
    counted = ["cloze"] if only_decode else ["cloze", "word"]
    assert list(kept) == [*counted, MEAN]
    assert kept[MEAN].num == 200 * len(counted)
    assert decode_shares(row_numbers(row, link_gbps=10.0, seed=0)) == "90, 28"


def test_texts_have_no_margin():
    texts = outcome(150, 140).model_copy(
        update={
            "metrics": (Metric(name="perplexity", dense=(1.0,), plan=(1.1,)),),
            "chance": (),
        }
    )
    row = RowOutcome(
        name="any", plan="f", prefill_removed=1, decode_removed=0, data={"text": texts}
    )
    assert margins(row, seed=0) == []
