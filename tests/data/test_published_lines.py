"""Lines of public benchmarks, as their owners publish them."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import yaml

from rayapp.data.lines import ChoiceLine, parse_line, read_lines
from rayapp.errors import DataError

OPTIONS = {"text": ["dry", "wet"], "label": ["1", "2"]}
LINES = {
    "PIQA": {"goal": "Open a jar", "sol1": "Twist it.", "sol2": "Eat it.", "label": 1},
    "HellaSwag": {
        "ind": 4, "activity_label": "Roof [x]", "ctx_a": "A man  sits.", "ctx_b": "he", "ctx": "-",
        "endings": ["is [title] here.", "falls [step] off."], "label": "0", "split": "val",
    },
    "ARC": {"id": "M_1", "question": "What is rain?", "choices": OPTIONS, "answerKey": "2"},
    "OpenBookQA": {"question_stem": "Rain is", "choices": OPTIONS, "answerKey": "1"},
    "CommonsenseQA": {
        "question": "What is rain? ", "question_concept": "rain", "answerKey": "B",
        "choices": {"text": ["dry", "wet", "red", "far", "old"], "label": list("ABCDE")},
    },
    "Social IQa": {
        "context": "Kim ran.", "question": "Why?", "answerA": "late", "answerB": "early",
        "answerC": "lost", "label": "3",
    },
    "BoolQ": {"passage": "Rain is wet.", "question": "is rain wet", "label": 1, "idx": 0},
    "MMLU": {
        "question": " 2+2? ", "subject": "abstract_algebra", "choices": ["1", "2", "3", "4"],
        "answer": 3,
    },
    "CMMLU": {"Question": "2+2? ", "A": "1", "B": "2", "C": "3", "D": "4", "Answer": "D"},
    "C-Eval": {"question": "2+2?", "A": "1", "B": "4", "C": "3", "D": "2", "answer": "B"},
}  # fmt: skip


HARNESS = {
    "PIQA": "piqa/piqa.yaml",
    "ARC": "arc/arc_easy.yaml",
    "OpenBookQA": "openbookqa/openbookqa.yaml",
    "CommonsenseQA": "commonsense_qa/default.yaml",
    "Social IQa": "siqa/siqa.yaml",
    "BoolQ": "super_glue/boolq/default.yaml",
    "MMLU": "mmlu/default/_default_template_yaml",
    "CMMLU": "cmmlu/_default_template_yaml",
    "C-Eval": "ceval/_default_ceval_yaml",
}
"""Where lm-evaluation-harness keeps its templates."""


@pytest.mark.parametrize("name", LINES)
def test_a_published_line_is_a_choice_of_its_benchmark(name):
    line = parse_line(LINES[name], "f line 1")
    assert isinstance(line, ChoiceLine)
    assert line.task == name
    assert all(choice.startswith(" ") and choice[1] != " " for choice in line.choices)


@pytest.mark.parametrize(
    ("name", "prompt", "right"),
    [
        ("PIQA", "Question: Open a jar\nAnswer:", " Eat it."),
        ("HellaSwag", "Roof : A man sits. He", " is. here."),
        ("ARC", "Question: What is rain?\nAnswer:", " wet"),
        ("OpenBookQA", "Rain is", " dry"),
        ("Social IQa", "Q: Kim ran. Why?\nA:", " lost"),
        ("BoolQ", "Rain is wet.\nQuestion: is rain wet?\nAnswer:", " yes"),
        (
            "MMLU",
            "The following are multiple choice questions (with answers) about abstract algebra."
            "\n\n2+2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:",
            " D",
        ),
        ("C-Eval", "2+2?\nA. 1\nB. 4\nC. 3\nD. 2\n答案\uff1a", " B"),
    ],
)
def test_prompts_and_answers(name, prompt, right):
    line = parse_line(LINES[name], "f line 1")
    assert (line.prompt, line.choices[line.answer]) == (prompt, right)


def test_other_spellings():
    original = {"passage": "p", "question": "q", "answer": False, "title": "t"}
    assert parse_line(original, "f").answer == 0
    assert parse_line(LINES["MMLU"] | {"answer": "C"}, "f").answer == 2
    assert parse_line(LINES["PIQA"] | {"task": "mine"}, "f").task == "mine"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"goal": "a", "sol1": "b", "sol2": "c"}, "`label` is missing"),
        (LINES["PIQA"] | {"label": -1}, "answer` is -1"),
        (LINES["HellaSwag"] | {"label": ""}, "line of HellaSwag .* use a split with answers"),
        (LINES["ARC"] | {"answerKey": "E"}, "'E' of 1, 2"),
        (LINES["MMLU"] | {"choices": "1234"}, "`choices`"),
        ({"sentence": "_", "option1": "a", "option2": "b", "answer": "1"}, "WinoGrande"),
    ],
)
def test_lines_that_cannot_be_asked_name_the_line(line, message):
    with pytest.raises(DataError, match=f"f line 7: .*{message}"):
        parse_line(line, "f line 7")


def test_calibration_takes_the_right_choice(tmp_path):
    path = tmp_path / "mixed.jsonl"
    lines = [LINES["PIQA"], {"prompt": "a", "choices": [" b", " c"], "answer": 0, "task": "t"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = (line for _, line in read_lines(path))
    assert (first.prompt, first.completion) == ("Question: Open a jar\nAnswer:", " Eat it.")
    assert (second.prompt, second.completion, second.task) == ("a", " b", "t")


def rendered(template, line):
    """A template of the harness, or the field that it names, for one line."""
    if template in line:
        return line[template]
    apply_template = pytest.importorskip("lm_eval.utils").apply_template
    return apply_template(template, line) if "{{" in template else template


@pytest.mark.parametrize("name", LINES)
def test_prompts_choices_and_answers_are_the_harness_s(name):
    lm_eval = pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'rayapp[lmeval]'"
    )
    raw, line = LINES[name], parse_line(LINES[name], "f line 1")
    if name == "HellaSwag":
        hellaswag = pytest.importorskip("lm_eval.tasks.hellaswag.utils")
        [made] = hellaswag.process_docs(pytest.importorskip("datasets").Dataset.from_list([raw]))
        prompt, choices, right = made["query"], made["choices"], made["gold"]
    else:
        file = Path(lm_eval.__file__).parent / "tasks" / HARNESS[name]
        task = yaml.safe_load(file.read_text())
        prompt = rendered(task["doc_to_text"], raw)
        choices = task["doc_to_choice"]
        if isinstance(choices, str):
            choices = ast.literal_eval(rendered(choices, raw))
        right = rendered(task["doc_to_target"], raw)
        right = choices.index(right) if right in choices else int(right)
    assert line.prompt.endswith(prompt)
    description = line.prompt.removesuffix(prompt)
    assert bool(description) == (name == "MMLU")  # its subjects' files set one before the template
    assert [choice.removeprefix(" ") for choice in line.choices] == choices
    assert line.answer == right
