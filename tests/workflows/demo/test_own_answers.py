"""Own answers as lines: splits share nothing, and sizes are what a machine can pay for."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from rayapp.data.lines import read_lines
from rayapp.data.shipped import PROSE_FILE, Seed, seeds
from rayapp.errors import InputError, ModelError
from rayapp.evaluation.data import read_data
from rayapp.evaluation.progress import silent
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.models.loading import load_model
from rayapp.workflows.demo import own_answers as module
from rayapp.workflows.demo.own_answers import own_answers, own_subject, split_of, write_lines
from rayapp.workflows.demo.subject import Files

FEW = [Seed("hello, you", "a"), Seed("a b c", "a"), Seed("one\n\ntwo", "b"), Seed("three", "b")]


@pytest.fixture(scope="module")
def path(tmp_path_factory, save_tiny):
    # Without the end marker's logit in reach, random weights answer to the last token.
    return save_tiny(tmp_path_factory.mktemp("own"), "llama", vocab_size=300)


def test_the_shipped_prompts_split_without_a_shared_word():
    every = seeds()
    assert len({seed.prompt for seed in every}) == len(every)
    sides = {name: [s for s in every if split_of(s) == name] for name in ("calibration", "test")}
    identities = [{seed.identity for seed in side} for side in sides.values()]
    assert not identities[0] & identities[1]
    counts = {name: Counter(seed.task for seed in side) for name, side in sides.items()}
    assert counts["calibration"].keys() == counts["test"].keys()
    assert min(counts["calibration"].values()) >= 6
    assert min(counts["test"].values()) >= module.TEST_PER_TASK
    # Questions about one paragraph stay together.
    paragraphs = Counter(seed.identity for seed in every if seed.task == "read")
    assert set(paragraphs.values()) == {2}


def test_the_shipped_prose_is_text_for_a_perplexity(byte_tokenizer):
    settings = EvaluationSettings(num_runs=0, num_window_tokens=512)
    data = read_data([PROSE_FILE], byte_tokenizer, max_positions=512, settings=settings)
    assert list(data.texts) == ["prose"]
    assert len(data.texts["prose"].lines) > 4


def test_answers_are_greedy_and_ranked(path):
    loaded = load_model(path)
    made = list(own_answers(loaded, FEW, silent))
    assert [answer.prompt for answer in made] == [seed.prompt for seed in FEW]
    for answer in made:
        prompt = loaded.tokenizer(answer.prompt, return_tensors="pt")["input_ids"]
        full = loaded.model.generate(
            prompt, max_new_tokens=module.MAX_ANSWER_TOKENS, do_sample=False
        )[0, prompt.shape[1] :].tolist()
        again = loaded.tokenizer(answer.answer)["input_ids"]
        if answer.rank < 2:
            assert full[: len(again)] == again
        if answer.rank == 0:
            assert full[len(again)] == 256
    assert {answer.rank for answer in made} <= {0, 1, 2}


def test_a_template_that_writes_the_begin_marker_is_not_begun_twice(path):
    loaded = load_model(path)
    tokenizer = loaded.tokenizer
    tokenizer.bos_token = "<|pad|>"
    tokenizer.chat_template = "<|pad|>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert module._as_sent(loaded, FEW[0]) == "<|pad|>hello, you"

    class Adds:
        """The tokenizer of a model whose prompts all begin with the marker."""

        chat_template, bos_token, bos_token_id = tokenizer.chat_template, "<|pad|>", 257
        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, text):
            return {"input_ids": [257]}

    loaded.__dict__["tokenizer"] = Adds()
    assert module._as_sent(loaded, FEW[0]) == "hello, you"


def test_without_a_template_a_question_is_asked_plainly(path, monkeypatch):
    loaded = load_model(path)
    loaded.tokenizer.chat_template = None
    answers = list(own_answers(loaded, FEW[:1], silent))
    assert [a.prompt for a in answers] in ([], ["Question: hello, you\nAnswer:"])
    assert not any("\n" in answer.answer for answer in answers)


@pytest.mark.parametrize(("budget_s", "per_task"), [(1e9, 2), (1e-9, 1)])
def test_lines_are_as_many_as_the_search_can_pay_for(
    path, tmp_path, monkeypatch, budget_s, per_task
):
    some = [s for s in seeds() if s.task in ("define", "read")]
    kept = {name: [s for s in some if split_of(s) == name] for name in ("calibration", "test")}
    chosen = [s for side in kept.values() for t in ("define", "read")
              for s in [x for x in side if x.task == t][:3]]  # fmt: skip
    monkeypatch.setattr(module, "seeds", lambda: chosen)
    monkeypatch.setattr(module, "SEARCH_S", budget_s)
    monkeypatch.setattr(module, "MAX_CALIBRATION_PER_TASK", 2)
    monkeypatch.setattr(module, "MAX_ANSWER_TOKENS", 4)
    files = Files(tmp_path)
    files.calibration.parent.mkdir()
    questions = write_lines(files, path, evaluations=10)
    calibration, test = (
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in (files.calibration, files.test)
    )
    counts = Counter(line["task"] for line in calibration)
    assert set(counts.values()) == {per_task}
    assert not {line["prompt"] for line in calibration} & {line["prompt"] for line in test}
    assert len(read_lines(files.calibration)) == len(calibration)
    assert {q.prompt for q in questions} <= {line["prompt"] for line in test}
    assert max(Counter(q.task for q in questions).values()) <= module.QUESTIONS_PER_TASK


def test_a_model_that_says_nothing_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "own_answers", lambda *_: iter(()))
    with pytest.raises(InputError, match="are empty, so nothing can be compared"):
        write_lines(Files(tmp_path), path, evaluations=10)


def test_sizes_follow_the_model(path, save_tiny, tmp_path):
    subject = own_subject(str(path))
    assert (subject.prefill_remove, subject.decode_remove) == (1, 1)
    assert subject.evaluations == 2 * 5 + 1 + module.VERIFIED
    assert subject.max_model_len == 512
    assert subject.model == str(path)
    shallow = save_tiny(tmp_path, "qwen3", num_hidden_layers=1)
    with pytest.raises(InputError, match="has 1 block, and the demo removes one"):
        own_subject(str(shallow))
    with pytest.raises(ModelError, match="no such model directory"):
        own_subject(str(tmp_path / "none"))
