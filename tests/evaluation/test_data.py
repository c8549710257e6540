"""Files of evaluation lines: directories, samples, texts, conversations, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayapp.errors import DataError
from rayapp.evaluation.data import EvaluationData, read_data
from rayapp.evaluation.evaluate import evaluate
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.evaluation.table import markdown
from rayapp.models.loading import read_signature
from rayapp.models.tokenizer import load_tokenizer
from rayapp.plan import Mode, PruningPlan, StagePlan

SETTINGS = EvaluationSettings(num_runs=0, num_resamples=100, max_rollout_tokens=5)


@pytest.fixture(scope="module")
def home(tmp_path_factory, save_tiny) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def read(home, tmp_path):
    """``read(file, text=file, **settings)`` reads files, named from ``tmp_path``."""

    def read(*names: str, texts: tuple[str, ...] = (), **changes: object) -> EvaluationData:
        return read_data(
            [tmp_path / name for name in names],
            load_tokenizer(home),
            max_positions=64,
            settings=SETTINGS.model_copy(update=changes),
            texts=[tmp_path / name for name in texts],
        )

    return read


def write(path: Path, *lines: dict[str, object]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_directory_stands_for_its_files(read, tmp_path):
    write(tmp_path / "set" / "b.jsonl", {"prompt": "b", "completion": "x", "task": "t"})
    write(tmp_path / "set" / "a.jsonl", {"prompt": "a", "completion": "x", "task": "t"})
    (tmp_path / "set" / "LICENSE").write_text("none of our business")
    data = read("set")
    assert [file.name for file in data.files] == ["a.jsonl", "b.jsonl"]
    assert [line.prompt for line in data.completions["t"]] == [(97,), (98,)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: a directory without any file of lines"):
        read("empty")


def test_a_limited_task_is_sampled_evenly_if_asked(read, tmp_path):
    write(tmp_path / "f.jsonl", *({"prompt": chr(97 + n), "completion": "x"} for n in range(10)))

    def prompts(**changes: object) -> str:
        return "".join(chr(line.prompt[0]) for line in read("f.jsonl", **changes).completions[""])

    assert prompts(limit=4) == "abcd"
    assert prompts(limit=4, spread=True) == "acfh"
    assert prompts(limit=20, spread=True) == "abcdefghij"


def test_completions_may_be_read_as_text(read, tmp_path):
    lines = ({"prompt": "the news ", "completion": "of today", "task": "xsum"}, {"text": "more"})
    write(tmp_path / "f.jsonl", *lines)
    data = read("f.jsonl", texts=("f.jsonl",))
    assert set(data.texts) == {"", "xsum, as text"}
    assert set(data.completions) == {"xsum"}
    windows = data.texts["xsum, as text"].lines
    ids = (*windows[0].prompt, *(i for line in windows for i in line.continuation))
    assert bytes(ids).decode() == "the news of today"
    write(tmp_path / "c.jsonl", {"prompt": "a", "choices": ["x", "y"], "answer": 0})
    with pytest.raises(DataError, match=r"c.jsonl line 1: is neither a text nor a completion"):
        read(texts=("c.jsonl",))


def test_conversations_are_named_and_hold_two_turns(read, tmp_path):
    turns = {"question_id": 1, "category": "writing", "turns": ["hello", "and now?"]}
    write(tmp_path / "mt_bench" / "question.jsonl", turns, {"turns": [{"content": "alone"}]})
    (task, openings), *others = read("mt_bench/question.jsonl").openings.items()
    assert (task, others) == ("mt_bench", [])
    assert [(bytes(o.prompt).decode(), o.turns) for o in openings] == [
        ("hello", ("hello", "and now?")),
        ("alone", None),
    ]


def test_rollouts_begin_with_prompts_of_every_kind(read, tmp_path):
    write(
        tmp_path / "f.jsonl",
        *({"prompt": f"ask {n}", "completion": "x", "task": "a"} for n in range(3)),
        {"prompt": "which", "choices": ["x", "y"], "answer": 0, "task": "b"},
        {"text": "a longer text", "task": "c"},
    )
    assert not read("f.jsonl").openings
    openings = read("f.jsonl", num_rollouts=2, chat=True).openings
    forms = {task: [opening.form for opening in some] for task, some in openings.items()}
    assert forms == {"a": ["plain"] * 2 + ["chat"] * 2, "b": ["plain", "chat"], "c": ["plain"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"turns": []}, r"line 1: `turns`"),
        ({"turns": ["hello", " "]}, r"line 1: `turns`: a turn is blank"),
        ({"turns": [3]}, r"line 1: `turns.0`"),
        ({"turns": ["a" * 60]}, r"line 1: 60 prompt tokens \+ 5 of an answer exceed .* 64"),
        ({"turns": ["a" * 30, "b" * 28]}, r"line 1: 63 prompt tokens \+ 5 of an answer exceed"),
    ],
)
def test_bad_conversations_are_refused(read, tmp_path, line, message):
    write(tmp_path / "f.jsonl", line)
    with pytest.raises(DataError, match=message):
        read("f.jsonl")


def test_a_model_without_a_chat_template_holds_no_conversation(home, read, tmp_path, monkeypatch):
    write(tmp_path / "f.jsonl", {"turns": ["hello"]})
    tokenizer = load_tokenizer(home)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"line 1: a conversation, .* no chat template"):
        read_data([tmp_path / "f.jsonl"], tokenizer, max_positions=64, settings=SETTINGS)


def test_what_the_plan_has_seen_stands_apart(home, tmp_path):
    """Tables of its own, no mean, no margin; other tasks are not touched."""
    path = write(
        tmp_path / "f.jsonl",
        *({"prompt": f"a{n}", "completion": "xy", "task": "copy"} for n in range(3)),
        *({"prompt": f"b{n}", "completion": "xy", "task": "sort"} for n in range(3)),
    )
    plan = PruningPlan(
        model=read_signature(home),
        decode=StagePlan(blocks={2: Mode.REMOVED}),
        provenance={"seen": {"tasks": ["Copy"]}},
    )
    result = evaluate(home, plan, [path], settings=SETTINGS)
    copy, sort = result.tasks
    assert copy.seen
    assert not sort.seen
    assert result.mean.kl == sort.kl
    assert [row.reason == copy.seen or not row.admitted for row in result.quality.margins]
    text = markdown(result)
    first, second = text.split("**Quality: dense beside plan")[1:]
    assert second.startswith(", on tasks that chose or trained the plan")
    assert "| sort |" in first
    assert "| copy |" in second
    assert "| mean |" not in second.split("**")[1]
    plain = evaluate(home, plan.model_copy(update={"provenance": {}}), [path], settings=SETTINGS)
    assert plain.mean.kl != sort.kl


def test_conversations_are_rolled_out_to_the_second_turn(home, tmp_path):
    path = write(tmp_path / "talks.jsonl", {"turns": ["hello", "go on"]}, {"turns": ["alone"]})
    result = evaluate(home, None, [path], settings=SETTINGS)
    first, second = result.rollouts
    assert [(row.source, row.form, row.num_rollouts) for row in (first, second)] == [
        ("talks", "chat", 2),
        ("talks", "second turn", 1),
    ]
    assert (first.agreement, first.num_same) == (1.0, 2)
    assert "| talks, second turn | 1 |" in markdown(result)


def test_a_test_set_remembers_who_met_it(home, tmp_path):
    path = write(tmp_path / "f.jsonl", {"prompt": "a", "completion": "b"})
    settings = SETTINGS.model_copy(update={"split": "test"})
    plan = PruningPlan(model=read_signature(home), decode=StagePlan(blocks={2: Mode.REMOVED}))
    first = evaluate(home, plan, [path], settings=settings, out=tmp_path / "a.json")
    again = evaluate(home, plan, [path], settings=settings, out=tmp_path / "b.json")
    other = evaluate(home, None, [path], settings=settings, out=tmp_path / "c.json")
    assert first.test_met_by == again.test_met_by == ()
    assert other.test_met_by == (plan.fingerprint,)
    assert any("was met before by 1 other plans" in caveat for caveat in other.caveats)
    chosen = evaluate(home, None, [path], settings=SETTINGS, out=tmp_path / "d.json")
    assert chosen.test_met_by == ()
