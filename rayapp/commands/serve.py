"""``rayapp serve``: a model or a plan of it behind an OpenAI-compatible API."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rayapp.commands.options import command
from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.errors import InputError
from rayapp.scaling.settings import Targets
from rayapp.vision.limits import ImageLimits


@command()
def serve(
    service: ServiceSettings,
    images: ImageLimits,
    targets: Targets,
    prefill_replicas: Annotated[
        str,
        typer.Option(metavar="MIN[:MAX]", help="Replicas that prefill; MIN:MAX follows the load."),
    ] = "1",
    decode_replicas: Annotated[
        str,
        typer.Option(metavar="MIN[:MAX]", help="Replicas that decode; MIN:MAX follows the load."),
    ] = "1",
    replicas: Annotated[
        str,
        typer.Option(metavar="MIN[:MAX]", help="Replicas of unified mode, which do both stages."),
    ] = "1",
    ingress_replicas: Annotated[
        int,
        typer.Option(min=1, help="Replicas that speak HTTP and share the requests."),
    ] = 1,
    device: Annotated[
        str | None,
        typer.Option(help="Device of every replica: cpu or cuda; cuda where --gpus is given."),
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs of every replica, in parts too; 1 with --device cuda."),
    ] = None,
    threads: Annotated[
        int,
        typer.Option(min=1, help="Torch threads of each process that computes."),
    ] = 1,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to serve on; without it, one is started here."),
    ] = None,
) -> None:
    """Serve a model, or a plan of it, over an OpenAI-compatible API until interrupted."""
    from rayapp.workflows.serve import serve_until_interrupted

    placed = _placed(device, gpus)

    def pool(count: str, **labels: str) -> dict[str, Any]:
        return {"replicas": count, "labels": labels, "num_cpus": float(threads), **placed}

    settings = ServiceSettings.parse(
        {
            **service.model_dump(exclude={"images", "prefill", "decode", "unified"}),
            "images": images,
            "ingress": {"replicas": ingress_replicas},
            "scaling": {"targets": targets},
            "prefill": pool(prefill_replicas, role="prefill"),
            "decode": pool(decode_replicas, role="decode"),
            "unified": pool(replicas),
        }
    )
    serve_until_interrupted(settings, address=address, say=typer.echo)


def _placed(device: str | None, gpus: float | None) -> dict[str, Any]:
    """Resolve device and GPUs of a replica; if one is missing, it follows from the other."""
    device = device or ("cuda" if gpus else "cpu")
    if gpus is None:
        gpus = 1.0 if device.startswith("cuda") else 0.0
    if bool(gpus) != device.startswith("cuda"):
        raise InputError(
            f"--device {device} with --gpus {gpus:g}: replicas on a GPU need --gpus above 0, "
            "others none; leave out one of the two"
        )
    return {"device": device, "num_gpus": gpus}
