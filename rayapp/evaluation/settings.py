"""How an evaluation is run."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from rayapp.evaluation.bootstrap import NUM_RESAMPLES


class EvaluationSettings(BaseModel):
    """Everything that decides what an evaluation measures, beside model, plan and data.

    ``split`` is a label for the record: which split the data files were drawn from. ``limit`` keeps
    the first examples of every task (windows, of texts). ``num_runs`` 0 skips the timings. A window
    of text (:mod:`rayapp.evaluation.measures.perplexity`) has ``num_window_tokens`` (None: 2,048,
    or the model's context where that is shorter); prefill runs the first ``window_prompt_share`` of
    it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    split: str = ""
    limit: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    num_resamples: int = Field(default=NUM_RESAMPLES, ge=100)
    num_window_tokens: int | None = Field(default=None, ge=2)
    window_prompt_share: float = Field(default=0.5, gt=0, lt=1)
    max_num_seqs: int = Field(default=32, ge=1, description="sequences decoded together")
    num_threads: int = Field(default=1, ge=1)
    num_runs: int = Field(default=30, ge=0, description="interleaved timed runs per batch size")
    batch_sizes: tuple[int, ...] = (1, 8)
    num_prompt_tokens: int = Field(default=128, ge=1, description="of text in a timed prompt")
    num_answer_tokens: int = Field(default=64, ge=2, description="of a timed answer")
