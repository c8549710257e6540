"""Any model as the demo's subject: it answers the shipped prompts itself, greedily.

A line asks of a plan what the dense model would have said, so a dense model has no errors, and
every point that is lost is the plan's. Prompts are split by the hash of their identity before
anything is answered, so calibration and test share none. All is sized by what a first measurement
says that a candidate costs here.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rayapp.api.openai.chat import ChatTemplate
from rayapp.api.openai.messages import ChatMessage
from rayapp.data.shipped import Seed, seeds
from rayapp.engine.local import LocalPipeline
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import InputError
from rayapp.evaluation.evaluate import num_threads
from rayapp.evaluation.progress import shown_progress
from rayapp.models.architecture import text_config
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.hub import locate
from rayapp.models.loading import LoadedModel, load_model
from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.evaluator.calibration import load_calibration
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.scorer import LocalCompute, Scorer
from rayapp.pruning.settings.objective import Objective
from rayapp.workflows.demo.subject import AskedQuestion, Files, Subject

CALIBRATION_SHARE = 0.45
"""Share of the hash range whose prompts calibrate; the others test (project default)."""

MAX_CALIBRATION_PER_TASK, TEST_PER_TASK, QUESTIONS_PER_TASK = 16, 16, 2
MAX_ANSWER_TOKENS, MAX_MODEL_LEN, TIMED_RUNS = 48, 512, 10
VERIFIED = 30
"""Candidates that the search may score beyond the single removals."""

SEARCH_S = 600.0
"""Seconds of one undisturbed evaluator that a search may take: two of them, which share caches and
memory, then need less than ten minutes (project default)."""

_PROBED_PER_TASK = 2
_BATCH = 16
_BASE_PROMPT, _BASE_STOP = "Question: {}\nAnswer:", ("\n",)


@dataclass(frozen=True)
class OwnAnswer:
    """A prompt as it is sent, with the model's own greedy answer.

    Attributes:
        seed: The shipped prompt.
        prompt: The prompt with the words of the chat template around it.
        answer: The text of the answer.
        rank: 0 for an answer that ended by itself and whose text gives the model's tokens again, 1
            for one that was cut off, 2 for a text that is split into other tokens.
        ended: Whether the answer ended by itself; of one that was cut off, no end is scored.
    """

    seed: Seed
    prompt: str
    answer: str
    rank: int
    ended: bool

    @property
    def line(self) -> str:
        """The answer as a line of a file of data."""
        fields = {"prompt": self.prompt, "completion": self.answer, "task": self.seed.task}
        return json.dumps(fields if self.ended else {**fields, "ends": False}) + "\n"

    @property
    def question(self) -> AskedQuestion:
        """The answer as a question to the service, shown by its last line."""
        words = self.seed.prompt.splitlines()[-1]
        shown = words if len(words) <= 70 else f"{words[:67]}..."
        return AskedQuestion(self.prompt, self.answer, self.seed.task, shown)


def own_subject(model: str, revision: str | None = None) -> Subject:
    """Make a subject of a directory or a Hub id; sizes grow with the number of its blocks.

    Raises:
        ModelError: The model cannot be used.
        InputError: The model has a single block, so nothing can be removed.
    """
    where = locate(model, revision)
    config = Checkpoint(where.directory).config
    num_blocks = text_config(config).num_hidden_layers
    if num_blocks < 2:
        raise InputError(
            f"{model}: has {num_blocks} block, and the demo removes one; give a deeper model"
        )
    evaluations = 2 * num_blocks + 1 + VERIFIED
    return Subject(
        name=where.name.rpartition("/")[2],
        model=where.pinned,
        directory=where.directory,
        prefill_remove=max(1, num_blocks // 10),
        decode_remove=max(1, num_blocks // 30),
        evaluations=evaluations,
        timed_runs=TIMED_RUNS,
        max_model_len=min(MAX_MODEL_LEN, text_config(config).max_position_embeddings),
        max_answer_tokens=MAX_ANSWER_TOKENS,
        what_is_evaluated="the dense model's own answers to prompts that the search never saw",
        write_lines=lambda files: write_lines(files, where.directory, evaluations),
    )


def split_of(seed: Seed) -> str:
    """The split that owns a prompt, ``calibration`` or ``test``, by the hash of its identity."""
    digest = hashlib.sha256(seed.identity.encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    return "calibration" if position < CALIBRATION_SHARE else "test"


def write_lines(files: Files, directory: Path, evaluations: int) -> list[AskedQuestion]:
    """Let the model answer, and write as many lines as a search of so many evaluations can pay for.

    Raises:
        InputError: The model's answers give no usable line.
        OSError: A file cannot be written.
    """
    with num_threads(1), shown_progress() as progress:
        loaded = load_model(directory)
        answers = list(own_answers(loaded, seeds(), progress))
        by_split = {name: _by_task(answers, name) for name in ("calibration", "test")}
        test = _first(by_split["test"], TEST_PER_TASK)
        if not test or not by_split["calibration"]:
            raise InputError(
                f"{directory}: its answers to the shipped prompts are empty, so nothing can be "
                "compared; give a model that was trained on text"
            )
        per_task = _affordable(loaded, by_split["calibration"], files, evaluations)
    _write(files.calibration, _first(by_split["calibration"], per_task))
    _write(files.test, test)
    return [answer.question for answer in _first(by_split["test"], QUESTIONS_PER_TASK)]


def own_answers(
    loaded: LoadedModel, prompts: Sequence[Seed], progress: Callable[[str, int, int], None]
) -> Iterator[OwnAnswer]:
    """Generate the model's greedy answers to prompts; prompts with an empty answer are left out."""
    pipeline = LocalPipeline(loaded.model, loaded.tokenizer, max_num_seqs=_BATCH)
    stop = () if loaded.tokenizer.chat_template else _BASE_STOP
    sampling = SamplingParams(max_tokens=MAX_ANSWER_TOKENS, stop=stop)
    for first in range(0, len(prompts), _BATCH):
        progress("the model's own answers", first, len(prompts))
        batch = prompts[first : first + _BATCH]
        texts = [_as_sent(loaded, seed) for seed in batch]
        for seed, text, made in zip(batch, texts, pipeline.generate(texts, sampling), strict=True):
            if made.text.strip():
                ended = made.finish_reason == "stop"
                rank = _rank(loaded, made.text, made.token_ids, ended=ended)
                yield OwnAnswer(seed, text, made.text, rank, ended)
    progress("the model's own answers", len(prompts), len(prompts))


def _as_sent(loaded: LoadedModel, seed: Seed) -> str:
    """Put a prompt into the words of the chat template, or into a plain form without one."""
    tokenizer = loaded.tokenizer
    if not tokenizer.chat_template:
        return _BASE_PROMPT.format(seed.prompt)
    message = ChatMessage(role="user", content=seed.prompt)
    text = ChatTemplate(tokenizer).render([message])
    # A line's prompt is tokenised with the special tokens that the template has written already.
    begin = tokenizer.bos_token
    is_added = begin and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(str(begin)) if is_added else text


def _rank(loaded: LoadedModel, text: str, token_ids: Sequence[int], *, ended: bool) -> int:
    again = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not again or list(token_ids[: len(again)]) != list(again):
        return 2
    return 0 if ended and len(again) > 1 else 1


def _by_task(answers: Sequence[OwnAnswer], split: str) -> dict[str, list[OwnAnswer]]:
    """Answers of a split by task, the best of use first, otherwise in their order."""
    by_task: dict[str, list[OwnAnswer]] = defaultdict(list)
    for answer in sorted(answers, key=lambda answer: answer.rank):
        if split_of(answer.seed) == split:
            by_task[answer.seed.task].append(answer)
    return dict(sorted(by_task.items()))


def _first(by_task: Mapping[str, Sequence[OwnAnswer]], per_task: int) -> list[OwnAnswer]:
    return [answer for answers in by_task.values() for answer in answers[:per_task]]


def _affordable(
    loaded: LoadedModel, by_task: Mapping[str, Sequence[OwnAnswer]], files: Files, evaluations: int
) -> int:
    """Number of lines per task with which the search keeps to its seconds, at least one."""
    _write(files.calibration, _first(by_task, _PROBED_PER_TASK))
    lines = load_calibration(files.calibration, loaded.tokenizer)
    objective = Objective()
    compute = LocalCompute(Evaluator(loaded.model, lines, objective))
    scorer = Scorer(lines, objective, compute, weights=loaded.signature.weights_fingerprint)
    scorer.score_many([DENSE])  # what all candidates share is not a candidate's cost
    began_s = time.process_time()  # other programs must not make the search smaller
    middle = loaded.signature.num_blocks // 2
    units = (2 * middle, 2 * middle + 1)
    scorer.score_many([Candidate(prefill=units), Candidate(decode=units)])
    one_s = (time.process_time() - began_s) / 2 / _PROBED_PER_TASK
    return max(1, min(MAX_CALIBRATION_PER_TASK, int(SEARCH_S / evaluations / one_s)))


def _write(file: Path, answers: Sequence[OwnAnswer]) -> None:
    file.write_text("".join(answer.line for answer in answers), encoding="utf-8")
