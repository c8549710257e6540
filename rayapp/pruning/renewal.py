"""Renews files that name their model by the first fingerprint of weights, which read samples only.

The old fingerprint is checked against the model before anything is written. A plan directory is
renewed with all files in it and below it: a file that names the weights, or a plan of them, by the
old fingerprint gets the new one, and keeps every other byte. So a search goes on from its journal,
scores and trained pairs are reused, and a report shows all that it showed. Plans are written last:
a renewal that was interrupted is done again.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayapp import __version__
from rayapp.errors import InputError, PlanError
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.fingerprints.sampled_fingerprint import sampled_fingerprint
from rayapp.plan import PLAN_FILE, STAGES, ModelSignature, PruningPlan
from rayapp.pruning.candidates.fits import all_fits
from rayapp.pruning.candidates.healing import Pair
from rayapp.pruning.healing.healed_units import DIRECTORY as PAIRS_DIRECTORY
from rayapp.pruning.healing.healed_units import unit_context, unit_file
from rayapp.pruning.search.journal import JOURNAL_FILE
from rayapp.pruning.settings.training import Training

_RECORDS = ("*.json", "*.jsonl")


@dataclass(frozen=True)
class Renewal:
    """The outcome of a renewal; paths are relative to ``directory``.

    Attributes:
        directory: The directory of the renewed files.
        model: The signature that the plans have now.
        old_fingerprint: The weights' fingerprint before.
        plans: Plans that were renewed.
        records: Renewed files beside the plans, trained pairs included.
    """

    directory: Path
    model: ModelSignature
    old_fingerprint: str
    plans: tuple[str, ...]
    records: tuple[str, ...]

    def summary(self) -> str:
        """The renewal in one line for people."""
        new = self.model.weights_fingerprint
        if not self.plans and not self.records:
            return f"{self.directory}: names its model {new} already; nothing was to be renewed"
        named = ", ".join([*self.plans, *self.records])
        return f"{self.directory}: weights {self.old_fingerprint} are {new} now in {named}"


def renew_plan(plan_path: str | Path, model: str | Path, out: str | Path | None = None) -> Renewal:
    """Renew a plan of the first fingerprint, and all files beside and below it.

    Renewed plans stay as they are, and so do plans of other models below the directory.

    Args:
        plan_path: A plan directory or its ``plan.json``; or a directory of several, as a front, a
            reproduction, or a search that was killed has.
        model: The checkpoint directory that the plan was made for.
        out: Directory to make for the renewed copy; None renews in place.

    Raises:
        PlanError: There is no plan, or it was made for another model; nothing was written.
        ModelError: The model directory cannot be used.
        InputError: ``out`` is taken, or a file cannot be written.
    """
    checkpoint = Checkpoint(model)
    home = _home(Path(plan_path))
    names = _Names(sampled_fingerprint(checkpoint), checkpoint.signature(), str(model))
    renewable = _Found.under(home, names)
    try:
        if out is None:
            return renewable.renew(home, home)
        if home.resolve() in Path(out).resolve().parents:
            raise InputError(f"{out}: lies in {home}, which is copied; give another --out")
        with _appearing(Path(out)) as copy:
            shutil.copytree(home, copy, dirs_exist_ok=True)
            return renewable.renew(copy, Path(out))
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{out or home}: cannot be renewed ({reason}); make it writable, or give another --out"
        ) from None


def renamed(content: bytes, names: Mapping[str, str]) -> bytes:
    """JSON text in which every string from ``names`` is replaced; the rest stays."""
    for old, new in names.items():
        content = content.replace(f'"{old}"'.encode(), f'"{new}"'.encode())
    return content


@dataclass(frozen=True)
class _Names:
    """The names of a model's weights by both fingerprints."""

    old: str
    new: ModelSignature
    model: str

    def fits(self, signature: ModelSignature) -> bool:
        """Whether a signature belongs to this model, by the old fingerprint or by the new one."""
        return signature in (
            self.new,
            self.new.model_copy(update={"weights_fingerprint": self.old}),
        )

    def check(self, signature: ModelSignature, where: Path) -> None:
        """Raise :class:`PlanError` if a signature does not belong to this model."""
        new = self.new.weights_fingerprint
        if signature.weights_fingerprint not in (self.old, new):
            raise PlanError(
                f"{where}: was made for weights {signature.weights_fingerprint}, but those of "
                f"{self.model} are {new}, and {self.old} by the earlier fingerprint: it is another "
                "model, or was trained since; use the checkpoint that the plan was searched on"
            )
        same = signature.model_copy(update={"weights_fingerprint": new})
        PruningPlan(model=same).check_model(self.new)


@dataclass(frozen=True)
class _Found:
    """The content of a directory that is to be renewed.

    Attributes:
        names: The names of the model's weights.
        plans: Renewed plans by their path below the directory.
        renames: New fingerprints of weights and plans by their old ones.
        contexts: Headers of the journals whose searches trained pairs.
    """

    names: _Names
    plans: dict[Path, PruningPlan]
    renames: dict[str, str]
    contexts: tuple[Mapping[str, Any], ...]

    @classmethod
    def under(cls, home: Path, names: _Names) -> _Found:
        """Collect all plans and journals in and below a directory.

        The directory's own must belong to the model; if it has none, one of those below must.
        """
        renewable = cls(names, {}, {names.old: names.new.weights_fingerprint}, ())
        plans, headers = _plans(home), _headers(home)
        signatures = {file: plan.model for file, plan in plans.items() if plan.model}
        signatures |= {
            file: ModelSignature.model_validate(header["model"]) for file, header in headers.items()
        }
        own = [file for file in signatures if file.parent == home]
        fitting = [file for file, signature in signatures.items() if names.fits(signature)]
        for file in own or ([] if fitting else [*signatures][:1]):
            names.check(signatures[file], file)
        for file in fitting:
            if file in plans:
                renewable._add(file.relative_to(home), plans[file])
        contexts = tuple(header for file, header in headers.items() if file in fitting)
        return cls(names, renewable.plans, renewable.renames, contexts)

    def _add(self, path: Path, plan: PruningPlan) -> None:
        """Add a plan as it will be, and the new names of it and of its block plan."""
        if plan.model == self.names.new:
            return
        note = {"weights_fingerprint": self.names.old, "rayapp": __version__}
        provenance = {**plan.provenance, "renewed": note}
        new = plan.model_copy(update={"model": self.names.new, "provenance": provenance})
        self.plans[path] = new
        for old, now in ((plan, new), (_bare(plan), _bare(new))):
            if old.fingerprint != now.fingerprint:
                self.renames[old.fingerprint] = now.fingerprint

    def renew(self, home: Path, shown: Path) -> Renewal:
        """Write everything into ``home``; the result names paths in ``shown``."""
        records = [*self._rename_records(home), *self._rename_pairs(home)]
        for path, plan in self.plans.items():
            _replace(home / path, plan.dumps().encode())
        return Renewal(
            shown, self.names.new, self.names.old, tuple(map(str, self.plans)), tuple(records)
        )

    def _rename_records(self, home: Path) -> Iterator[str]:
        """Rename in journals, scores and evaluations: all JSON that names the weights or plans."""
        for pattern in _RECORDS:
            for file in sorted(home.rglob(pattern)):
                before = file.read_bytes() if file.name != PLAN_FILE else b""
                after = renamed(before, self.renames)
                if after != before:
                    _replace(file, after)
                    yield str(file.relative_to(home))

    def _rename_pairs(self, home: Path) -> Iterator[str]:
        """Rename the files of trained pairs, whose names hash everything that they depend on."""
        kept = sorted(home.rglob(f"{PAIRS_DIRECTORY}/*.safetensors"))
        names = {old: new for header in self.contexts for old, new in self._pair_files(header)}
        for file in kept:
            if file.name in names:
                file.replace(file.with_name(names[file.name]))
                yield str(file.with_name(names[file.name]).relative_to(home))

    def _pair_files(self, header: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Old and new names of the files of every pair that a search can have trained."""
        if "heal_data" not in header:
            return
        settings, blocks = header["settings"], self.names.new.num_blocks
        old, new = (
            unit_context(
                weights=weights,
                data=header["heal_data"],
                first_token=settings["first_token"],
                dtype=settings["dtype"],
                training=Training(settings.get("heal_steps"), settings.get("heal_learning_rate")),
            )
            for weights in (self.names.old, self.names.new.weights_fingerprint)
        )
        for stage in STAGES:
            for first in range(blocks - 1):
                for pair in (Pair(stage, first, first + 1), Pair(stage, first + 1, first)):
                    yield unit_file(old, pair), unit_file(new, pair)
        for fit in all_fits(blocks):
            yield unit_file(old, fit), unit_file(new, fit)


def _home(path: Path) -> Path:
    """The directory of a plan that is given as a directory or as its file."""
    if path.is_dir():
        return path
    PruningPlan.load(path)  # raises an error that says what is wrong
    return path.parent


def _bare(plan: PruningPlan) -> PruningPlan:
    """The block plan that a selection of KV is made for."""
    return plan.model_copy(update={"kv_transfer": {}})


def _plans(home: Path) -> dict[Path, PruningPlan]:
    """The plans in and below a directory; unreadable ones below it are passed over.

    Raises:
        PlanError: The directory's own plan is unreadable, or there is neither plan nor journal.
    """
    files = sorted(home.rglob(PLAN_FILE))
    if home / PLAN_FILE in files or not (files or any(home.rglob(JOURNAL_FILE))):
        PruningPlan.load(home)  # raises an error that says what is wrong
    plans = {}
    for file in files:
        with suppress(PlanError):
            plans[file] = PruningPlan.load(file)
    return plans


def _headers(home: Path) -> dict[Path, dict[str, Any]]:
    """The first line of every journal that names its model; a kill may have left less."""
    headers = {}
    for file in sorted(home.rglob(JOURNAL_FILE)):
        with file.open("rb") as stream, suppress(ValueError, TypeError, KeyError):
            header = json.loads(stream.readline())
            ModelSignature.model_validate(header["model"])
            headers[file] = header
    return headers


def _replace(file: Path, content: bytes) -> None:
    """Write a file whole, or leave it as it was."""
    draft = file.with_name(f"{file.name}.tmp")
    draft.write_bytes(content)
    draft.replace(file)


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A new directory beside ``target`` that takes its name on success, or else is removed."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target}: is there, and nothing is replaced; give another --out")
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        made.chmod(0o755)
        yield made
        made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
