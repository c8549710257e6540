"""The whole loop on a model: search, evaluate, serve on separate nodes, ask, account.

Everything that a user would do by hand, on a local cluster of three nodes: the search is a Ray job,
the answers come over HTTP, and the table at the end is made of what was measured on the way.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from ray.job_submission import JobStatus, JobSubmissionClient
from rich.console import Console
from rich.table import Table

from rayapp.distributed.cluster.local import LocalCluster, local_cluster
from rayapp.distributed.cluster.ports import free_port
from rayapp.distributed.serve.deploy import RunningService, running_service
from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.errors import ClusterError, InputError
from rayapp.evaluation.evaluate import evaluate
from rayapp.evaluation.progress import shown_progress
from rayapp.evaluation.report.findings import gather
from rayapp.evaluation.report.page import write_report
from rayapp.evaluation.result import EvaluationResult, TaskResult
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.plan import PruningPlan
from rayapp.workflows.conclusion import conclude
from rayapp.workflows.demo.subject import AskedQuestion, Files, Subject
from rayapp.workflows.demo.testbed import shipped_subject
from rayapp.workflows.tables import ledger_tables, plan_tables

WORKERS = 2
NEXT_REDUCTION = 4  # times fewer bytes, which the first command after the demo asks for


def run_demo(out: Path, console: Console, subject: Subject | None = None) -> None:
    """Run the loop and leave its files in ``out``.

    Args:
        out: The directory of the files.
        console: Where the steps are shown.
        subject: The model and its sizes; None is the shipped test-bed.

    Raises:
        InputError: ``out`` cannot be written, or the model gives no usable line.
        ClusterError: The cluster, the job or the service did not come up.
    """
    began_s = time.monotonic()
    subject, files = subject or shipped_subject(), Files(out.absolute())
    questions = _write_data(subject, files)
    with local_cluster(dashboard_port=free_port()) as cluster:
        _heading(
            console, "1. search", f"a Ray job on {len(cluster.nodes)} nodes, {WORKERS} workers"
        )
        _search(cluster, subject, files, console)
        plan = PruningPlan.load(files.plan)
        console.print(*plan_tables(plan), sep="\n")
        _heading(console, "2. evaluate", f"dense beside plan, {subject.what_is_evaluated}")
        evaluation = _evaluate(subject, plan, files)
        _heading(console, "3. serve", "prefill and decode on nodes of their own")
        ledger = _serve(cluster, subject, files, questions, console)
    write_report(files.report, gather(files.out))
    _heading(console, "4. result", f"{time.monotonic() - began_s:.0f} s in all, files in {out}")
    console.print(*ledger_tables(ledger), result_table(evaluation), sep="\n")
    for line in [*conclude(plan, evaluation, ledger), *_way_on(subject, out)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _write_data(subject: Subject, files: Files) -> Sequence[AskedQuestion]:
    try:
        files.calibration.parent.mkdir(parents=True, exist_ok=True)
        return subject.write_lines(files)
    except OSError as error:
        raise InputError(
            f"{files.out}: cannot be written ({error}); choose another --out"
        ) from None


def _heading(console: Console, title: str, what: str) -> None:
    console.rule(f"[bold]{title}[/bold]: {what}", align="left")


def _search(cluster: LocalCluster, subject: Subject, files: Files, console: Console) -> None:
    """Submit the search as a job and show its log; raises :class:`ClusterError` where it fails."""
    assert cluster.dashboard_url, "the demo's cluster has a dashboard"
    client = JobSubmissionClient(cluster.dashboard_url)
    options = {
        "model": subject.model, "calibration": files.calibration, "out": files.out,
        "prefill-remove": subject.prefill_remove, "decode-remove": subject.decode_remove,
        "evaluations": subject.evaluations, "workers": WORKERS,
        # Ray tells a job the address of this machine's newest cluster, which may be another one.
        "address": cluster.address,
    }  # fmt: skip
    for stale in (files.journal, files.plan, files.trials):
        stale.unlink(missing_ok=True)  # a second demo is a new search
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    job = client.submit_job(
        entrypoint=shlex.join([sys.executable, "-m", "rayapp.cli", "prune", *words]),
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}},
    )
    shown = 0
    while True:
        status, log = client.get_job_status(job), client.get_job_logs(job)
        for line in log[shown:].splitlines():
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
        shown = len(log)
        if status.is_terminal():
            break
        time.sleep(1.0)
    files.log.write_text(log, encoding="utf-8")
    if status != JobStatus.SUCCEEDED:
        raise ClusterError(f"the search job {job} ended as {status.value}; its log is {files.log}")


def _evaluate(subject: Subject, plan: PruningPlan, files: Files) -> EvaluationResult:
    # The machine is the user's, and does other things, too: only CPU seconds can be compared there.
    settings = EvaluationSettings(
        split="test", num_runs=subject.timed_runs, batch_sizes=(1,), clock="cpu"
    )
    with shown_progress() as progress:
        return evaluate(
            subject.directory, plan, [files.test], settings=settings, out=files.evaluation,
            progress=progress,
        )  # fmt: skip


def _serve(
    cluster: LocalCluster,
    subject: Subject,
    files: Files,
    questions: Sequence[AskedQuestion],
    console: Console,
) -> dict[str, Any]:
    """Serve the plan, ask the questions, and return the ledger."""
    settings = ServiceSettings(
        model=subject.model, plan=str(files.out), served_model_name=subject.name,
        max_model_len=subject.max_model_len, port=free_port(),
    )  # fmt: skip
    with running_service(settings, address=cluster.address) as service:
        _show_pools(service, console)
        with files.answers.open("w", encoding="utf-8") as answers:
            for question in questions:
                answer = _ask(service, question, subject.max_answer_tokens, console)
                answers.write(json.dumps(answer) + "\n")
        ledger: dict[str, Any] = httpx.get(f"{service.url}/v1/transfers", timeout=10.0).json()
    files.ledger.write_text(json.dumps(ledger, indent=2) + "\n", encoding="utf-8")
    return ledger


def _show_pools(service: RunningService, console: Console) -> None:
    table = Table("pool", "node", "parameters", "KV pages")
    for pool, replicas in service.health["pools"].items():
        for replica in replicas:
            sizes = (f"{replica[name] / 1e6:.2f} MB" for name in ("parameter_bytes", "kv_bytes"))
            table.add_row(pool, replica["node"][:12], *sizes)
    console.print(f"ready at {service.url}", table, sep="\n", highlight=False)


def _ask(
    service: RunningService, question: AskedQuestion, max_tokens: int, console: Console
) -> dict[str, Any]:
    """Ask one question, streamed, and show the answer as it comes."""
    console.print(f"  {question.task} {question.shown}  ", end="", **_PLAIN)
    answer = ""
    for piece in _streamed(service, question.prompt, max_tokens):
        console.print(piece, end="", style="bold", **_PLAIN)
        answer += piece
    right = answer == question.answer
    console.print("  right" if right else f"  wrong, expected {question.answer}", **_PLAIN)
    line = {"prompt": question.prompt, "completion": question.answer, "task": question.task}
    return {**line, "answer": answer, "right": right}


_PLAIN: Any = {"markup": False, "highlight": False}


def _streamed(service: RunningService, prompt: str, max_tokens: int) -> Iterator[str]:
    """The text pieces of a greedy answer, as they arrive."""
    body = {
        "model": service.settings.model_name, "prompt": prompt, "max_tokens": max_tokens,
        "temperature": 0, "stream": True,
    }  # fmt: skip
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=60.0) as reply:
        if reply.status_code != httpx.codes.OK:
            raise ClusterError(f"the service answered {reply.status_code}: {reply.read().decode()}")
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[len("data: ") :])["choices"][0]["text"]


def result_table(evaluation: EvaluationResult) -> Table:
    """Dense beside plan: quality per task, speed, and bytes per request."""
    table = Table("", "dense", "plan", "ratio", title="dense beside plan", title_justify="left")
    mean, timing = evaluation.mean, evaluation.latency[0]
    assert mean is not None, "a finished evaluation has a mean"
    table.add_row("answer NLL (nats/token)", f"{mean.dense_nll:.4f}", f"{mean.plan_nll:.4f}", "")
    for task in evaluation.tasks:
        table.add_row(f"exact match, {task.task}", *_matches(task), "")
    for name in ("prefill_ms", "tpot_ms"):
        dense, plan = getattr(timing.dense, name), getattr(timing.plan, name)
        words = {"prefill_ms": "prefill ms", "tpot_ms": "decode ms per token"}[name]
        table.add_row(words, f"{dense:.2f}", f"{plan:.2f}", f"{dense / plan:.3f}x")
    full, sent = mean.bytes_full / mean.num_examples, mean.bytes_sent / mean.num_examples
    ratio = f"{mean.bytes_full / mean.bytes_sent:.3f}x"
    table.add_row("KV bytes per request", f"{full:,.0f}", f"{sent:,.0f}", ratio)
    caption = f"{evaluation.model_caption}; " if evaluation.model_caption else ""
    sizes = f"{timing.num_prompt_tokens} tokens in, {timing.num_answer_tokens} out"
    table.caption = (
        f"{caption}{evaluation.tasks[0].num_examples} held-out examples per task, "
        f"{evaluation.dtype}; timing: {sizes}, batch {timing.batch_size}, median of "
        f"{timing.num_runs} interleaved runs, CPU seconds of one thread"
    )
    return table


def _matches(task: TaskResult) -> tuple[str, str]:
    return f"{task.dense_exact_match:.3f}", f"{task.plan_exact_match:.3f}"


def _way_on(subject: Subject, out: Path) -> Iterator[str]:
    """Where to look, and the commands that go on from here, each as it can be pasted."""
    yield f"All of it on one page: {Files(out).report}"
    for purpose, words in next_commands(subject, Files(out)).items():
        yield f"{purpose}:\n  {shlex.join([_program(), *words])}"


def next_commands(subject: Subject, files: Files) -> dict[str, list[str]]:
    """The words after ``rayapp`` of commands that use what the demo left, by what they do."""
    model = ["--model", _short_model(subject)]
    plan = ["--plan", str(files.out)]
    goal = ["--target-reduction", str(NEXT_REDUCTION), "--encoding", "int8"]
    lines = ["--calibration", str(files.calibration)]
    test = ["--data", str(files.test), "--split", "test", "--out", str(files.evaluation)]
    return {
        "Choose what KV travels (some minutes)": ["kv-select", *model, *plan, *lines, *goal],
        "Measure what that costs": ["evaluate", *model, *plan, *test],
        "Draw the page again": ["report", *plan],
        "Serve the plan until Ctrl-C": ["serve", *model, *plan],
    }


def _program() -> str:
    """How ``rayapp`` of this environment is called from here."""
    installed = Path(sys.executable).with_name("rayapp")
    elsewhere = installed.is_file() and shutil.which("rayapp") != str(installed)
    return _short(installed) if elsewhere else "rayapp"


def _short_model(subject: Subject) -> str:
    """The model as commands take it from here: its directory, or its Hub id."""
    directory = subject.directory
    return _short(directory) if subject.model == str(directory.absolute()) else subject.model


def _short(path: Path) -> str:
    """A path from the working directory where it lies below that."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
