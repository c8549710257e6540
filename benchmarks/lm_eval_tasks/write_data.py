"""Questions of the test-bed as files for lm-evaluation-harness: answers.jsonl and choices.jsonl.

    pip install 'rayapp[lmeval]'
    rayapp export --model rayapp/testbed/text --plan DIR --stage unified --out out/exported
    python benchmarks/lm_eval_tasks/write_data.py --out out/data
    cd out/data && HF_DATASETS_OFFLINE=1 HF_HUB_OFFLINE=1 lm_eval --model hf \
        --model_args pretrained=../exported --tasks rayapp_answers,rayapp_choices \
        --include_path ../../benchmarks/lm_eval_tasks --device cpu --batch_size 1

A wrong choice is the answer with one character changed, so that no rule but the task's tells them
apart. The two tasks read any other file of the same form.
"""

from __future__ import annotations

import argparse
import json
import random
import string
from pathlib import Path
from typing import Any

from rayapp.testbed.tasks import LENGTHS, SPLITS, TASKS, Example, generate

NUM_CHOICES = 4


def altered(answer: str, rng: random.Random) -> str:
    """The answer with one character replaced by another of its kind."""
    place = rng.randrange(len(answer))
    kind = string.digits if answer[place].isdigit() else string.ascii_lowercase
    other = rng.choice(kind.replace(answer[place], ""))
    return answer[:place] + other + answer[place + 1 :]


def choice_line(example: Example, seed: int) -> dict[str, Any]:
    """A line of choices.jsonl; it is the same for the same example and seed."""
    rng = random.Random(f"{seed} {example.prompt}")
    choices = [example.completion]
    while len(choices) < NUM_CHOICES:
        wrong = altered(example.completion, rng)
        if wrong not in choices:
            choices.append(wrong)
    rng.shuffle(choices)
    answer = choices.index(example.completion)
    return {"prompt": example.prompt, "choices": choices, "answer": answer}


def write_data(out: Path, *, split: str, count: int, seed: int, length: str) -> None:
    """Write both files, with ``count`` questions of every task in each."""
    examples = [e for task in TASKS for e in generate(task, split, count, seed, length=length)]
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in (
        ("answers.jsonl", [example.line() for example in examples]),
        ("choices.jsonl", [choice_line(example, seed) for example in examples]),
    ):
        (out / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument("--count", type=int, default=100, help="questions per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", choices=tuple(LENGTHS), default="mixed")
    options = parser.parse_args()
    write_data(
        options.out,
        split=options.split,
        count=options.count,
        seed=options.seed,
        length=options.length,
    )


if __name__ == "__main__":
    main()
