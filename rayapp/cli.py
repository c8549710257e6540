"""The command line: parse, call one function of a room below, print.

Bad input is one line and exit code 2.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from rayapp.errors import InputError, RayappError, RequestError

# Rooms are imported inside the commands: `rayapp --help` must not wait for torch and ray.

app = typer.Typer(
    help="Prune a language model per inference stage; serve prefill and decode apart on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
plan_app = typer.Typer(help="Look at plans, and renew them.", no_args_is_help=True)
app.add_typer(plan_app, name="plan")

Model = Annotated[Path, typer.Option("--model", help="Model directory (safetensors).")]
Plan = Annotated[Path | None, typer.Option("--plan", help="Plan directory or plan.json.")]
DTypeOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Element type; auto keeps the checkpoint's."),
]


def main() -> None:
    """Entry point of ``rayapp``: every error that we raise on purpose becomes one line."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        app()
    except InputError as error:
        sys.exit(_complain(error, 2))
    except RayappError as error:
        sys.exit(_complain(error, 1))
    except KeyboardInterrupt:
        sys.exit(130)


def _complain(error: RayappError, code: int) -> int:
    Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, highlight=False)
    return code


def _load_plan(path: Path | None) -> Any:
    from rayapp.plan import PruningPlan

    return PruningPlan.load(path) if path else PruningPlan()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for all that it leaves.")] = Path("out/demo"),
) -> None:
    """The whole loop on the small shipped model: search, evaluate, serve, ask, account, report."""
    from rayapp.commands.demo import run_demo

    run_demo(out, Console())


@app.command()
def doctor(
    model: Annotated[Path | None, typer.Option(help="A model directory to look at.")] = None,
    plan: Plan = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default: a local one.")] = None,
) -> None:
    """Whether this machine, or a cluster, can do what the other commands ask of it."""
    from rayapp.commands.doctor import examine
    from rayapp.commands.tables import finding_line

    if plan is not None and model is None:
        raise RequestError("--plan was given without --model: a plan fits one model; give both")
    console, failed = Console(), False
    for finding in examine(model, plan, address):
        console.print(finding_line(finding), highlight=False, soft_wrap=True)
        failed |= finding.status == "failed"
    if failed:
        raise typer.Exit(1)


@app.command()
def serve(
    model: Model,
    plan: Plan = None,
    mode: Annotated[
        Literal["disaggregated", "unified"], typer.Option(help="Stages apart, or in one replica.")
    ] = "disaggregated",
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen.")] = 8000,
    prefill_replicas: Annotated[str, typer.Option(metavar="MIN[:MAX]")] = "1",
    decode_replicas: Annotated[str, typer.Option(metavar="MIN[:MAX]")] = "1",
    replicas: Annotated[str, typer.Option(metavar="MIN[:MAX]", help="Of unified mode.")] = "1",
    served_model_name: Annotated[str | None, typer.Option(help="Default: directory name.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="RAYAPP_API_KEY")] = None,
    allow_unauthenticated: Annotated[
        bool, typer.Option("--allow-unauthenticated", help="Without a key beyond loopback.")
    ] = False,
    max_model_len: Annotated[int | None, typer.Option(help="Prompt and answer.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Per decode replica.")] = 8,
    max_waiting: Annotated[int, typer.Option(help="Beyond it: 429.")] = 256,
    max_images: Annotated[
        int | None, typer.Option(help="Per request; 0: none. Default: 8.")
    ] = None,
    max_image_bytes: Annotated[
        int | None, typer.Option(help="Of one image as it is sent. Default: 20 MiB.")
    ] = None,
    max_image_pixels: Annotated[
        int | None, typer.Option(help="Width x height of one. Default: 25 million.")
    ] = None,
    image_host: Annotated[
        list[str] | None,
        typer.Option(help="Host that images may be fetched from; several times. Default: none."),
    ] = None,
    gpus: Annotated[float, typer.Option(help="GPUs per replica; 0 runs on CPU.")] = 0.0,
    dtype: DTypeOption = "auto",
    address: Annotated[str | None, typer.Option(help="Ray cluster; default: a local one.")] = None,
) -> None:
    """Serve a model, or a plan of it, over an OpenAI-compatible API until interrupted."""
    from rayapp.commands.serve import serve_until_interrupted
    from rayapp.distributed.serve.settings import ServiceSettings

    def pool(count: str, **labels: str) -> dict[str, Any]:
        device = "cuda" if gpus else "cpu"
        return {"replicas": count, "labels": labels, "num_gpus": gpus, "device": device}

    image_limits = {
        "max_images": max_images, "max_bytes": max_image_bytes, "max_pixels": max_image_pixels,
        "allowed_hosts": image_host,
    }  # fmt: skip
    settings = ServiceSettings.parse(
        {
            "model": str(model), "plan": str(plan) if plan else None, "mode": mode, "host": host,
            "port": port, "served_model_name": served_model_name, "api_key": api_key,
            "max_model_len": max_model_len, "max_num_seqs": max_num_seqs,
            "max_waiting": max_waiting, "dtype": dtype,
            "images": {name: given for name, given in image_limits.items() if given is not None},
            "prefill": pool(prefill_replicas, role="prefill"),
            "decode": pool(decode_replicas, role="decode"), "unified": pool(replicas),
        }
    )  # fmt: skip
    serve_until_interrupted(
        settings, address=address, allow_unauthenticated=allow_unauthenticated, say=typer.echo
    )


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="Prompt text; may be given several times.")],
    image: Annotated[
        list[Path] | None, typer.Option(help="Image file shown with every prompt; several times.")
    ] = None,
    plan: Plan = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 keeps all.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling noise.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text.")] = None,
    dtype: DTypeOption = "auto",
) -> None:
    """Answer prompts in this process: the reference that the service must equal. No Ray."""
    from pydantic import ValidationError

    from rayapp.engine.local import LocalPipeline, with_images
    from rayapp.engine.request import SamplingParams
    from rayapp.models.loading import load_model
    from rayapp.vision.llava import image_processor_of

    try:
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            stop=tuple(stop or ()),
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise RequestError(f"{option} {first['input']}: {first['msg']}") from None
    pruning_plan = _load_plan(plan)
    loaded = load_model(model, plan=pruning_plan, stage="unified", dtype=dtype)
    processor = image_processor_of(model, loaded.model.config)
    pipeline = LocalPipeline(
        loaded.model, loaded.tokenizer, pruning_plan, image_processor=processor
    )
    prompts = [with_images(text, image, pipeline) for text in prompt] if image else list(prompt)
    for completion in pipeline.generate(prompts, sampling):
        typer.echo(completion.text)


@app.command()
def prune(
    model: Model,
    calibration: Annotated[Path, typer.Option(help="JSON lines of prompt and completion.")],
    out: Annotated[str, typer.Option(help="Directory (or pyarrow URI) for what is found.")],
    prefill_remove: Annotated[float, typer.Option(help="Blocks; parts count 1/2.")] = 0.0,
    decode_remove: Annotated[float, typer.Option(help="Blocks; parts count 1/2.")] = 0.0,
    target_speedup: Annotated[
        float | None, typer.Option(help="Instead of sizes: so many times faster than dense.")
    ] = None,
    pareto: Annotated[
        bool, typer.Option("--pareto", help="A front of plans of all sizes up to those given.")
    ] = False,
    unit: Annotated[
        Literal["block", "part"], typer.Option(help="What is removed whole.")
    ] = "block",
    kv_modes: Annotated[
        bool, typer.Option(help="Prefill may skip a block and still write its KV.")
    ] = True,
    shared: Annotated[bool, typer.Option(help="One set for both stages.")] = False,
    pruning_set: Annotated[
        bool, typer.Option(help="Remove blocks of PDTrim's pruning set only.")
    ] = False,
    distillation_threshold: Annotated[
        float, typer.Option(help="Similarity from which on a block is in the pruning set.")
    ] = 0.95,
    heal: Annotated[
        Literal["none", "pair", "all"],
        typer.Option(help="Removed blocks whose work a trained survivor takes over."),
    ] = "none",
    heal_data: Annotated[
        Path | None, typer.Option(help="JSON lines to train survivors on; with --heal.")
    ] = None,
    heal_steps: Annotated[int, typer.Option(min=1, help="Training steps of a survivor.")] = 100,
    heal_learning_rate: Annotated[
        float | None, typer.Option(help="At the first step; default: by the model's width.")
    ] = None,
    visual_tokens: Annotated[
        str | None,
        typer.Option(help="Kept per image: a count, a share, or JSON as in a plan."),
    ] = None,
    method: Annotated[
        Literal[
            "annealing",
            "cbo",
            "evolution",
            "exhaustive",
            "greedy",
            "one_shot",
            "random",
            "similarity",
            "surrogate",
            "window",
        ],
        typer.Option(help="Search method."),
    ] = "surrogate",
    score_by: Annotated[
        Literal["task", "token"], typer.Option(help="What weighs equally.")
    ] = "task",
    objective: Annotated[Literal["kl", "nll"], typer.Option(help="What is minimised.")] = "kl",
    kl_top_k: Annotated[int, typer.Option(min=0, help="KL over so many tokens; 0: all.")] = 0,
    racing: Annotated[bool, typer.Option(help="Score all lines for the best only.")] = False,
    first_token: Annotated[
        Literal["prefill", "decode"], typer.Option(help="Stage that makes the first answer token.")
    ] = "prefill",
    evaluations: Annotated[int | None, typer.Option(min=1, help="Candidates at most.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Ray evaluators; 0: none, in process.")] = 0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    address: Annotated[str | None, typer.Option(help="Ray cluster to use.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the journal.")] = False,
    dtype: DTypeOption = "auto",
) -> None:
    """Search which blocks (or parts) prefill and decode can each do without."""
    from rayapp.commands.prune import prune as search
    from rayapp.commands.prune import prune_front
    from rayapp.pruning.progress import ProgressReport
    from rayapp.pruning.settings import PruneSettings

    logging.getLogger("rayapp").setLevel(logging.INFO)
    settings = PruneSettings.checked(
        model=str(model), calibration=str(calibration), out=out, prefill_remove=prefill_remove,
        decode_remove=decode_remove, target_speedup=target_speedup, pareto=pareto,
        unit=unit, kv_modes=kv_modes, shared=shared,
        pruning_set=pruning_set, distillation_threshold=distillation_threshold,
        heal=heal, heal_data=str(heal_data) if heal_data else None,
        heal_steps=heal_steps, heal_learning_rate=heal_learning_rate,
        visual_tokens=visual_tokens, method=method,
        score_by=score_by, objective=objective, kl_top_k=kl_top_k, racing=racing,
        first_token=first_token, evaluations=evaluations, workers=workers,
        seed=seed, address=address, resume=resume, dtype=dtype,
    )  # fmt: skip
    with ProgressReport() as report:
        found = prune_front if settings.pareto else search
        summary = found(settings, on_progress=report).summary(out)
    typer.echo(summary)


@app.command()
def kv_select(
    model: Model,
    plan: Annotated[Path, typer.Option("--plan", help="Plan directory or plan.json.")],
    calibration: Annotated[Path, typer.Option(help="JSON lines of prompt and completion.")],
    target_reduction: Annotated[
        float | None, typer.Option(help="Best quality with so many times fewer bytes than dense.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Instead: fewest bytes within this KL to dense.")
    ] = None,
    dtype: Annotated[
        Literal["model", "int8", "int4"],
        typer.Option(help="Smallest encoding allowed; model never quantises."),
    ] = "model",
    method: Annotated[
        Literal["elimination", "mass"],
        typer.Option(help="Sets scored jointly, or PDTrim's rule on attention mass."),
    ] = "elimination",
    threshold: Annotated[
        float | None, typer.Option(help="For mass: cut blocks from this share on.")
    ] = None,
    first: Annotated[
        str | None, typer.Option(help="Entries a cut keeps at the start: 4, or 0.1.")
    ] = None,
    last: Annotated[
        list[str] | None, typer.Option(help="And at the end; may be given several times.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for the new plan; default: in place.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Ray evaluators; 0: none, in process.")] = 0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    address: Annotated[str | None, typer.Option(help="Ray cluster to use.")] = None,
) -> None:
    """Choose which KV of a plan travels, and in which encoding."""
    from rayapp.commands.kv_select import kv_select as select
    from rayapp.commands.tables import kv_table
    from rayapp.pruning.kv_choice.settings import KVSelectSettings, amounts
    from rayapp.pruning.progress import ProgressReport

    logging.getLogger("rayapp").setLevel(logging.INFO)
    settings = KVSelectSettings.checked(
        model=str(model), plan=str(plan), calibration=str(calibration),
        target_reduction=target_reduction, max_kl=max_kl, encoding=dtype, method=method,
        threshold=threshold, out=str(out) if out else None, workers=workers, seed=seed,
        address=address, **amounts(first, last),
    )  # fmt: skip
    with ProgressReport() as report:
        found = select(settings, on_progress=report)
    Console().print(kv_table(found))
    typer.echo(found.summary(str(out or plan)))


@app.command()
def evaluate(
    model: Model,
    data: Annotated[list[Path], typer.Option(help="JSON lines; may be given several times.")],
    plan: Plan = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
    split: Annotated[str, typer.Option(help="Which split the data are, for the record.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Examples per task.")] = None,
    runs: Annotated[int, typer.Option(min=0, help="Timed runs per batch size; 0: none.")] = 30,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    compare_visual_tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Also all methods of visual pruning, so many tokens kept; may be repeated."
        ),
    ] = None,
    dtype: DTypeOption = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for all GPUs.")] = "cpu",
) -> None:
    """Dense beside plan: exact match, multiple choice, perplexity, KL, bytes and latency."""
    from rayapp.evaluation.evaluate import evaluate as measure
    from rayapp.evaluation.progress import shown_progress
    from rayapp.evaluation.settings import EvaluationSettings
    from rayapp.evaluation.table import tables, visual_table

    settings = EvaluationSettings(split=split, limit=limit, num_runs=runs, seed=seed)
    with shown_progress() as progress:
        result = measure(
            model, plan, data, settings=settings, dtype=dtype, device=device, out=out,
            progress=progress,
        )  # fmt: skip
    console = Console()
    for table in tables(result):
        console.print(table.rich())
    for caveat in result.caveats:
        console.print(f"not for quotation: {caveat}", highlight=False)
    if not compare_visual_tokens:
        return
    from rayapp.evaluation.visual.study import compare, study_of

    with shown_progress() as progress:
        study = study_of(compare_visual_tokens)
        found = compare(
            model, data, study, settings=settings, dtype=dtype, device=device, progress=progress
        )
    console.print(visual_table(found).rich())
    beside = out or plan
    if beside is not None:
        typer.echo(found.save_beside(beside))


@app.command()
def report(
    plan: Annotated[Path, typer.Option("--plan", help="Plan directory or plan.json.")],
    evaluation: Annotated[
        Path | None, typer.Option(help="JSON of evaluate; default: evaluation.json beside it.")
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option(help="JSON of transfers; default: ledger.json beside it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="HTML file; default: report.html there.")] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="First measure what each block costs alone.")
    ] = False,
    model: Annotated[Path | None, typer.Option(help="For --sensitivity.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="For --sensitivity.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Ray evaluators; 0: none, in process.")] = 0,
    address: Annotated[str | None, typer.Option(help="Ray cluster to use.")] = None,
) -> None:
    """Draw all that is known of a plan on one HTML page."""
    from rayapp.evaluation.report.findings import gather
    from rayapp.evaluation.report.page import REPORT_FILE, write_report

    if sensitivity != bool(model and calibration) or bool(model) != bool(calibration):
        raise InputError(
            "--sensitivity runs a model on lines, and nothing else does: give it with --model and "
            "--calibration, or none of the three"
        )
    if sensitivity:
        from rayapp.commands.sensitivity import measure
        from rayapp.evaluation.progress import shown_progress

        with shown_progress() as progress:
            measure(
                plan, model=str(model), calibration=str(calibration), workers=workers,
                address=address, progress=progress,
            )  # fmt: skip
    home = plan if plan.is_dir() else plan.parent
    findings = gather(plan, evaluation=evaluation, ledger=ledger)
    typer.echo(write_report(out or home / REPORT_FILE, findings))
    for what in findings.left_out:
        typer.echo(f"left out: {what}", err=True)


@app.command()
def export(
    model: Model,
    plan: Annotated[Path, typer.Option("--plan", help="Plan directory or plan.json.")],
    stage: Annotated[
        Literal["prefill", "decode", "unified"],
        typer.Option(help="One stage, or the one model that both are."),
    ],
    out: Annotated[Path, typer.Option(help="Directory to make.")],
) -> None:
    """Write a stage as an ordinary Hugging Face checkpoint, where it removes whole blocks only."""
    from rayapp.evaluation.progress import shown_progress
    from rayapp.export import export_stage

    with shown_progress() as progress:
        record = export_stage(model, plan, stage, out, progress=progress)
    total = record.source.num_blocks
    typer.echo(f"{out}: {stage} with {len(record.kept_blocks)} of {total} blocks")


@app.command()
def transfers(
    url: Annotated[str, typer.Option(help="Base URL of a service.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="RAYAPP_API_KEY")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the raw ledger.")] = False,
) -> None:
    """Print the transfer ledger of a running service."""
    import httpx

    from rayapp.commands.tables import ledger_tables

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(f"{url.rstrip('/')}/v1/transfers", headers=headers, timeout=10.0)
        answer.raise_for_status()
        ledger = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise InputError(f"{url}: gave no ledger ({error}); is a service running there?") from None
    if as_json:
        typer.echo(answer.text)
    else:
        Console().print(*ledger_tables(ledger), sep="\n")


@plan_app.command("show")
def plan_show(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Plan directory or plan.json.")],
) -> None:
    """Draw what each stage computes and which KV travels."""
    from rayapp.commands.tables import plan_tables

    Console().print(*plan_tables(_load_plan(path)), sep="\n")


@plan_app.command("renew")
def plan_renew(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Plan directory or plan.json.")],
    model: Model,
    out: Annotated[
        Path | None, typer.Option(help="Directory for a renewed copy; default: in place.")
    ] = None,
) -> None:
    """Renew a plan that names its model by an earlier release's fingerprint, which is checked."""
    from rayapp.commands.plan import renew

    typer.echo(renew(path, model=model, out=out).summary())


if __name__ == "__main__":
    main()
