"""Published sets in the place of calibration, heal and evaluation files."""

from __future__ import annotations

from pathlib import Path

from rayapp.data.published_sets import write_files
from rayapp.evaluation.paper.settings import PUBLISHED, ReproduceSettings
from rayapp.models.tokenizer import load_tokenizer

DATA_DIRECTORY = "data"


def with_files(settings: ReproduceSettings) -> tuple[ReproduceSettings, tuple[str, ...]]:
    """Settings that name files alone, and the calibration files that blocks are mapped on.

    Files of a directory of published sets are written to ``data/`` of the output directory. Files
    that are given by name take precedence.

    Raises:
        DataError: The directory holds nothing to calibrate on or to judge by, or a bad line, or a
            set that is named is not in it.
    """
    wanted = {name: path for name, path in settings.data.items() if Path(path).is_dir()}
    if not wanted:
        assert settings.calibration is not None, "the settings were checked"
        return settings, (settings.calibration,)
    files = write_files(
        next(iter(wanted.values())),
        Path(settings.out) / DATA_DIRECTORY,
        num_sets=max(settings.maps, 1),
        lines_per_task=settings.calibration_per_task,
        seed=settings.seed,
        tokenizer=load_tokenizer(settings.model),
        judged_by=() if PUBLISHED in wanted else tuple(wanted),
        text_tokens=settings.text_tokens,
    )
    given = {name: path for name, path in settings.data.items() if name not in wanted}
    update = {
        "data": {**files.judged, **given},
        "calibration": settings.calibration or files.calibration[0],
        "heal_data": settings.heal_data or files.heal_data,
    }
    return settings.model_copy(update=update), files.calibration
