"""The speed of a plan's answers beside the dense model's: interleaved runs without transfer.

An answer of N tokens takes ``prefill + (N - 1) x TPOT``. Prefill is timed until the first answer
token is known; if decode samples that token, decode's first step is part of the time. Within a
batch, prompts are prefilled one by one and decoded together; the prefill of a run is the mean over
its prompts. If the data have images, timed prompts begin with one, which is decoded and encoded
anew every time.

The handoff is reported apart: the seconds in which a prompt's KV enters decode's cache are
measured, and its bytes are computed over a named link.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from rayapp.engine.decode import DecodeEngine
from rayapp.engine.prefill import PrefillEngine, PrefillOutput
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import InputError, IntegrityError
from rayapp.evaluation.bootstrap import CONFIDENCE
from rayapp.evaluation.measures.likelihood import TwoStages
from rayapp.evaluation.measures.prompt_bytes import PromptBytes
from rayapp.evaluation.progress import ProgressCallback, silent
from rayapp.evaluation.result import LatencyResult, StageTimes
from rayapp.evaluation.settings import Clock, EvaluationSettings
from rayapp.models.stack import BlockStack
from rayapp.vision.inputs import ImageInput
from rayapp.vision.reader import ImageReader

_RESAMPLES = 2_000


@dataclass(frozen=True)
class RunTimes:
    """One run's times: seconds to a prompt's first answer token, and per decode step after it.

    ``admit_s`` are the seconds in which a prompt's KV enters decode's cache.
    """

    prefill_s: float
    tpot_s: float
    admit_s: float | None = None


Run = Callable[[], RunTimes]
CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class TimedImage:
    """The image that timed prompts begin with.

    ``reader`` makes an image reader without a cache for a prefill stage.
    """

    image: ImageInput
    placeholder_id: int
    reader: Callable[[BlockStack], ImageReader]


def measure_latency(
    dense: TwoStages,
    plan: TwoStages,
    settings: EvaluationSettings,
    *,
    batch_size: int,
    length: tuple[int, int] | None = None,
    progress: ProgressCallback = silent,
    image: TimedImage | None = None,
) -> LatencyResult:
    """Time both sides on the same random prompts, alternating, after one untimed run of each.

    ``length`` are tokens of prompt and answer; None takes the first of the settings. The number of
    threads is torch's at the moment; this function does not change it.

    Raises:
        InputError: The CPU's clock is to time what a GPU computes.
    """
    if settings.clock == "cpu" and dense.prefill.device.type != "cpu":
        raise InputError(
            f"clock=cpu with a model on {dense.prefill.device}: it does not see what the device "
            "computes; give --clock wall"
        )
    num_prompt, num_answer = length or settings.timed_lengths[0]
    requests = _requests(settings.seed, (num_prompt, num_answer), batch_size, plan, image)
    clock = CLOCKS[settings.clock]
    sides = [_EngineRun(side, requests, image, clock) for side in (dense, plan)]
    what = f"timing, batch {batch_size}"
    dense_runs, plan_runs = interleave(
        sides[0], sides[1], settings.num_runs, on_run=lambda n: progress(what, n, settings.num_runs)
    )
    sent = [0, 0] if image else [PromptBytes.of(s, [num_prompt]).bytes_sent for s in (dense, plan)]
    return LatencyResult(
        speedup_at_least=least_speedup(dense_runs, plan_runs, num_answer, seed=settings.seed),
        num_prompt_tokens=requests[0].num_prompt_tokens,
        num_image_tokens=image.image.num_tokens if image else 0,
        num_answer_tokens=num_answer,
        batch_size=batch_size,
        num_runs=settings.num_runs,
        num_threads=torch.get_num_threads(),
        clock=settings.clock,
        dense=medians(dense_runs, num_answer, bytes_sent=sent[0]),
        plan=medians(plan_runs, num_answer, bytes_sent=sent[1]),
        link_gbps=None if image else settings.link_gbps,
        first_token=plan.plan.first_token,
    )


def interleave(
    dense: Run, plan: Run, num_runs: int, *, on_run: Callable[[int], None] = lambda _done: None
) -> tuple[list[RunTimes], list[RunTimes]]:
    """Alternate both sides, which go first in turn; one warm-up run of each is dropped."""
    dense(), plan()
    dense_runs: list[RunTimes] = []
    plan_runs: list[RunTimes] = []
    for index in range(num_runs):
        order = [(dense, dense_runs), (plan, plan_runs)]
        for run, runs in order if index % 2 == 0 else reversed(order):
            runs.append(run())
        on_run(index + 1)
    return dense_runs, plan_runs


def medians(
    runs: Sequence[RunTimes], num_answer_tokens: int, *, bytes_sent: int | None = None
) -> StageTimes:
    """Medians over runs; that of whole answers is taken over answers, not summed from medians."""
    answers = _answers(runs, num_answer_tokens)
    admitted = [run.admit_s for run in runs if run.admit_s is not None]
    return StageTimes(
        prefill_ms=1e3 * statistics.median(run.prefill_s for run in runs),
        tpot_ms=1e3 * statistics.median(run.tpot_s for run in runs),
        answer_ms=1e3 * statistics.median(answers),
        admit_ms=1e3 * statistics.median(admitted) if admitted else None,
        bytes_sent=bytes_sent or None,
    )


def least_speedup(
    dense: Sequence[RunTimes], plan: Sequence[RunTimes], num_answer_tokens: int, *, seed: int = 0
) -> float:
    """The one-sided 95 % lower bound of the speed-up of whole answers, over resampled runs."""
    dense_N, plan_N = (np.array(_answers(runs, num_answer_tokens)) for runs in (dense, plan))
    rng = np.random.default_rng(seed)
    index_RN = rng.integers(len(dense_N), size=(_RESAMPLES, len(dense_N)))
    ratios_R = np.median(dense_N[index_RN], axis=1) / np.median(plan_N[index_RN], axis=1)
    return float(np.quantile(ratios_R, 1 - CONFIDENCE, method="lower"))


def _answers(runs: Sequence[RunTimes], num_answer_tokens: int) -> list[float]:
    """Seconds of a whole answer, run by run."""
    return [run.prefill_s + (num_answer_tokens - 1) * run.tpot_s for run in runs]


def _requests(
    seed: int, length: tuple[int, int], batch_size: int, side: TwoStages, image: TimedImage | None
) -> list[GenerationRequest]:
    """Random prompts and how long their answers are."""
    rng, vocab_size = random.Random(seed), side.decode.vocab_size
    sampling = SamplingParams(max_tokens=length[1], ignore_eos=True)
    place = image.placeholder_id if image else None
    words = [token for token in range(vocab_size) if token != place]
    requests = []
    for index in range(batch_size):
        text = tuple(rng.choices(words, k=length[0]))
        request = GenerationRequest(f"timing-{index}", text, sampling)
        if image is not None:
            prompt_ids = (image.placeholder_id, *text)
            request = replace(
                request, prompt_token_ids=prompt_ids, images=(image.image,), text_token_ids=text
            )
        requests.append(request)
    return requests


class _EngineRun:
    """One side's engines, which answer the same requests every time that it is called."""

    def __init__(
        self,
        side: TwoStages,
        requests: list[GenerationRequest],
        image: TimedImage | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        first = requests[0]
        max_model_len = first.num_prompt_tokens + first.sampling.max_tokens
        self._requests = requests
        self._first_by_decode = side.plan.first_token == "decode"
        # Text has no visual tokens to prune, whatever rule the plan has for them.
        plan = side.plan if image else side.plan.model_copy(update={"visual_tokens": None})
        self._prefill = PrefillEngine(
            side.prefill,
            plan,
            max_model_len=max_model_len,
            images=image.reader(side.prefill) if image else None,
        )
        self._decode = DecodeEngine(
            side.decode, side.plan, max_num_seqs=len(requests), max_model_len=max_model_len
        )

    def __call__(self) -> RunTimes:
        begun_s = self._clock()
        outputs = [self._prefill.run(request) for request in self._requests]
        prefill_s = (self._clock() - begun_s) / len(outputs)
        begun_s = self._clock()
        self._admit(outputs)
        admit_s = (self._clock() - begun_s) / len(outputs)
        if self._first_by_decode:
            prefill_s += self._steps(1)
        num_steps = self._requests[0].sampling.max_tokens - 1
        tpot_s = self._steps(num_steps) / num_steps
        if self._decode.num_running:
            raise IntegrityError(f"{self._decode.num_running} timed answers did not end in time")
        return RunTimes(prefill_s, tpot_s, admit_s)

    def _admit(self, outputs: list[PrefillOutput]) -> None:
        for request, output in zip(self._requests, outputs, strict=True):
            if output.segment is None:
                raise IntegrityError(f"{request.request_id} ended with its first token")
            self._decode.admit(request, output.segment, output.first)

    def _steps(self, count: int) -> float:
        begun_s = self._clock()
        for _ in range(count):
            self._decode.step()
        return self._clock() - begun_s
