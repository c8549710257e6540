"""Questions as files: a line of JSON per question, a picture per scene."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from rayapp.testbed.vision.questions.words import IMAGE_TOKEN
from rayapp.testbed.vision.scenes.picture import draw_picture
from rayapp.testbed.vision.score import AskedScene

PICTURES = "images"
"""Folder of the pictures, beside the lines."""


def prompt_of(text: str) -> str:
    """The prompt that asks a question about a picture."""
    return f"{IMAGE_TOKEN}\n{text}"


def write_questions(path: Path | str, asked: Sequence[AskedScene]) -> None:
    """Write ``{"prompt", "completion", "task", "image"}`` lines, and the pictures beside them.

    ``task`` is the type of the question. ``image`` is the path of a PNG file, relative to the
    folder of ``path``; the questions about a scene share it, so it is encoded once.

    Args:
        path: The file of lines; its folder is made if missing.
        asked: Scenes with their questions.
    """
    file = Path(path)
    (file.parent / PICTURES).mkdir(parents=True, exist_ok=True)
    lines = []
    for asked_scene in asked:
        digest = hashlib.sha256(asked_scene.scene.identity.encode()).hexdigest()
        picture = Path(PICTURES) / f"{digest[:24]}.png"
        Image.fromarray(draw_picture(asked_scene.scene)).save(file.parent / picture)
        for question in asked_scene.questions:
            line = {
                "prompt": prompt_of(question.text),
                "completion": question.answer,
                "task": question.task,
                "image": picture.as_posix(),
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    file.write_text("".join(lines), encoding="utf-8")
