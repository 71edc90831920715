"""The HTTP application on Ray Serve: ``serve run skipnet_rt.serving.ray:app``, or with the shipped ``ray.yaml``.

Every replica is the application of :mod:`skipnet_rt.serving.app` around a predictor of its own, with Ray Serve's
batching in the place of ours. Ray Serve's proxy takes the requests and spreads them over the replicas, refuses with 503
what is too much for all of them, and has replicas started and stopped as the load asks for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from skipnet_rt.serving.batching import Prepare
from skipnet_rt.serving.predictor import Prediction, Predictor
from skipnet_rt.serving.settings import Settings, read_token

try:
    import ray
    from pydantic import TypeAdapter
    from ray import serve

    from skipnet_rt.serving.app import create_app
except ImportError as error:
    raise ImportError(f"Ray Serve needs {error.name}; install it with: pip install 'skipnet-rt[ray]'") from None

Request = tuple[Tensor, bool]
"""An image, and whether to compute it densely, too."""


def app(arguments: dict[str, Any]) -> serve.Application:
    """The application, for ``serve run`` and for Ray Serve's configuration files.

    Args:
        arguments: ``model``, a checkpoint (the bundled network by default); ``token_file``, a file with the bearer
            token to ask for; and any other field of :class:`Settings`. Every machine must see the files.

    Raises:
        ValueError: an argument is unknown, or its value is no good.
    """
    arguments = dict(arguments)
    # Absolute: a replica works in a folder of its own.
    model, token_file = (Path(arguments.pop(name)).absolute() if name in arguments else None
                         for name in ("model", "token_file"))
    known = {field.name for field in fields(Settings)} - {"token"}  # what stands in a configuration is no secret
    if unknown := sorted(set(arguments) - known):
        raise ValueError(f"unknown argument {unknown[0]!r}; known: model, token_file, {', '.join(sorted(known))}")
    settings = TypeAdapter(Settings).validate_python(arguments)  # on the command line all is text

    def build() -> Any:
        """The ASGI application of a replica, in its process."""
        token = None if token_file is None else read_token(token_file)  # only here: a closure is sent about
        own = ray.get_runtime_context().get_assigned_resources()
        predictor = Predictor(model, threads=max(1, int(own.get("CPU", 1))), device="cuda" if own.get("GPU") else "cpu")

        async def compute(requests: list[Request]) -> list[Prediction]:
            return await computed(requests, predictor, application.state.on_batch)

        batched = serve.batch(max_batch_size=settings.max_batch,
                              batch_wait_timeout_s=settings.max_wait_ms / 1e3)(compute)

        async def infer(prepare: Prepare) -> list[Prediction]:
            images, dense = await asyncio.to_thread(prepare, False)
            return list(await asyncio.gather(*(batched((image, dense)) for image in images)))

        application = create_app(predictor, replace(settings, token=token), infer)
        return application

    # A replica is given its next batch while it computes one: with fewer requests at a time batches never fill.
    replica = serve.deployment(serve.ingress(build)(), name="SkipNet", max_ongoing_requests=2 * settings.max_batch,
                               max_queued_requests=settings.max_queue, ray_actor_options={"num_cpus": 1})
    return replica.bind()


async def computed(requests: Sequence[Request], predictor: Predictor,
                   on_batch: Callable[[list[Prediction]], None]) -> list[Prediction]:
    """The predictions of a batch: all in one call of the engine, but those that are timed densely, too, alone.

    Args:
        requests, predictor: what to compute, and what computes it, in threads.
        on_batch: told the predictions of every call.
    """
    plain = [place for place, (_, dense) in enumerate(requests) if not dense]
    calls = [plain] * bool(plain) + [[place] for place, (_, dense) in enumerate(requests) if dense]
    predictions: dict[int, Prediction] = {}
    for places in calls:
        images, dense = [requests[place][0] for place in places], requests[places[0]][1]
        done = await asyncio.to_thread(predictor.infer, images, dense)
        on_batch(done)
        predictions.update(zip(places, done, strict=True))
    return [predictions[place] for place in range(len(requests))]
