from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayapp.data.lines import read_lines
from rayapp.data.published_sets import IN_DOMAIN, prompt_hash, write_files
from rayapp.errors import DataError


def prompts(path: str) -> list[str]:
    return [prompt_hash(line.prompt) for _, line in read_lines(path)]


@pytest.fixture(scope="module")
def home(tmp_path_factory, published_sets):
    return published_sets(tmp_path_factory.mktemp("sets"))


def test_sets_are_disjoint_and_what_calibrates_is_named_so(home, tmp_path):
    files = write_files(home, tmp_path, num_sets=3, lines_per_task=4, seed=1)
    sets = [prompts(path) for path in (*files.calibration, files.heal_data)]
    assert [len(each) for each in sets[:3]] == [12, 12, 12]
    assert len(sets[3]) == 36
    every = [prompt for each in sets for prompt in each]
    assert len(set(every)) == len(every)
    assert sorted(files.judged) == ["ARC-e", f"WikiText{IN_DOMAIN}", "XSum"]
    lines = [line for _, line in read_lines(files.calibration[0])]
    tasks = {line.task for line in lines}
    assert all(line.ends == (line.task != "WikiText") for line in lines), "texts are cut off"
    assert tasks == {"WikiText", "PIQA", "instructions"}
    article = json.loads(Path(files.judged["XSum"]).read_text().splitlines()[0])
    assert article["task"] == "XSum"
    assert not {"#", "S"} & set(article["text"]), "the request for a summary is no text"


def test_the_draw_depends_on_the_seed_alone(home, tmp_path):
    drawn = [
        write_files(home, tmp_path / name, num_sets=1, lines_per_task=4, seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    first, again, other = (prompts(files.calibration[0]) for files in drawn)
    assert first == again
    assert first != other


def test_no_judged_prompt_calibrates(home, tmp_path, published_sets):
    both = published_sets(tmp_path / "both")
    train = (both / "piqa" / "train.jsonl").read_text()
    (both / "piqa" / "valid.jsonl").write_text("\n".join(train.split("\n")[:30]))
    files = write_files(both, tmp_path / "out", num_sets=2, lines_per_task=2)
    judged = set(prompts(files.judged[f"PIQA{IN_DOMAIN}"]))
    assert judged
    assert not judged & {p for path in (*files.calibration, files.heal_data) for p in prompts(path)}


def test_instructions_stand_in_the_model_s_own_template(home, tmp_path, byte_tokenizer):
    class Chat:
        chat_template = "any"

        def apply_chat_template(self, messages, **_options):
            return f"<user>{messages[0]['content']}</user>"

    files = write_files(home, tmp_path, num_sets=1, lines_per_task=2, tokenizer=Chat())
    for _, line in read_lines(files.calibration[0]):
        assert line.prompt.startswith("<user>") == (line.task == "instructions")


def test_sets_are_chosen_and_texts_are_cut(home, tmp_path, byte_tokenizer):
    files = write_files(
        home, tmp_path, num_sets=1, lines_per_task=2, tokenizer=byte_tokenizer,
        judged_by=("XSum",), text_tokens=100,
    )  # fmt: skip
    assert list(files.judged) == ["XSum"]
    assert len(Path(files.judged["XSum"]).read_text().splitlines()) == 2, "79 tokens, then 158"


@pytest.mark.parametrize(
    ("removed", "options", "message"),
    [
        (("wikitext2", "piqa", "instructions"), {}, "holds no set to calibrate on"),
        (("arc", "long_prompts", "wikitext2/test.txt"), {}, "holds no set to judge by"),
        ((), {"judged_by": ("MMLU",)}, "holds no set 'MMLU' to judge by; use some of ARC-e"),
        ((), {"num_sets": 30}, "24 lines of WikiText do not make 30 calibration sets"),
    ],
)
def test_what_is_missing_is_named(tmp_path, published_sets, removed, options, message):
    home = published_sets(tmp_path / "sets")
    for name in removed:
        (home / name).rename(tmp_path / name.replace("/", "-"))
    with pytest.raises(DataError, match=message):
        write_files(home, tmp_path / "out", **{"num_sets": 1, "lines_per_task": 2, **options})


def test_a_bad_line_is_named(home, tmp_path, published_sets):
    sets = published_sets(tmp_path / "sets")
    (sets / "arc" / "arc_easy_test.jsonl").write_text('{"prompt": "q"}\n')
    with pytest.raises(DataError, match=r"arc_easy_test.jsonl line 1"):
        write_files(sets, tmp_path / "out", num_sets=1, lines_per_task=2)
