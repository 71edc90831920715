"""The HTTP application: a FastAPI app around a predictor, for uvicorn and for Ray Serve.

A request is taken or refused at the door, before its body is read. Then its body is read up to a limit, and a thread
of the batcher's parses it, makes images of its pictures and computes them, with others' or alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import metadata, resources
from typing import Any

import torch
from torch import Tensor

from skipnet_rt.serving.batching import Batcher, NotQuickError, Prepare
from skipnet_rt.serving.pictures import PictureError
from skipnet_rt.serving.predictor import Prediction, Predictor
from skipnet_rt.serving.settings import Settings

try:
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel, Field
    from starlette.requests import ClientDisconnect
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from skipnet_rt.serving.forms import SCHEMA, Order, RequestError, parsed
    from skipnet_rt.serving.metrics import CONTENT_TYPE, Metrics
except ImportError as error:
    raise ImportError(f"the server needs {(error.name or str(error)).partition('.')[0]}; "
                      "install it with: pip install 'skipnet-rt[serve]'") from None

Infer = Callable[[Prepare], Awaitable[list[Prediction]]]
"""Computes the images of one request; a thread of its own prepares them where that need not be quick."""

_OPEN = ("/", "/healthz", "/readyz", "/openapi.json")  # to those without a token, too: nothing there is worth one

_BODIES = 8  # requests of the largest size that are kept in memory at the same time; smaller ones are more

_QUICK_BODY, _QUICK_PIXELS = 2**16, 2**16  # bytes and pixels that a thread which everybody waits for may unpack

_PAGE_HEADERS = {"Content-Security-Policy": (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")}

_SECURITY_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class ClassProbability(BaseModel):
    """A class of the network's, and its probability."""

    number: int = Field(alias="class")
    label: str
    probability: float


class Result(ClassProbability):
    """What one picture came to: its most probable class, and what that took."""

    classes: list[ClassProbability] = Field(description="The `top` most probable classes, best first.")
    route: list[bool] = Field(description="Whether each residual block ran; the first always does.")
    blocks_run: int
    blocks: int = Field(description="Residual blocks of the network.")
    computation: float = Field(description="The published computation percentage.")
    multiply_adds: int = Field(description="Of convolutions and gates.")
    milliseconds: float = Field(description="That the engine took for the batch with this picture in it.")
    batch: int = Field(description="Pictures in that batch.")
    dense_milliseconds: float | None = Field(description="With every block forced to run, where `dense` asked for it.")


class Results(BaseModel):
    """The answer to a prediction's request."""

    results: list[Result] = Field(description="In the order of the pictures.")


class Problem(BaseModel):
    """The answer to a request that was not carried out."""

    detail: str


_PROBLEMS: dict[int | str, dict[str, Any]] = {status: {"model": Problem, "description": words} for status, words in {
    400: "The request is malformed.",
    401: "The token is missing or wrong.",
    408: "The body did not come in time.",
    413: "The body, a picture or the number of pictures is too large.",
    415: "The body is neither a form nor JSON.",
    422: "A picture cannot be read.",
    500: "A mistake of the server's.",
    503: "As many requests as may are waiting; Retry-After says when to try again.",
    504: "The answer was not there in time.",
}.items()}


class _Desk:
    """Takes requests for predictions and answers them.

    Args:
        predictor, settings: as for :func:`create_app`.
        infer: computes a request's images.
        metrics: told of what is inside.
    """

    def __init__(self, predictor: Predictor, settings: Settings, infer: Infer, metrics: Metrics) -> None:
        self._predictor, self._settings, self._infer, self._metrics = predictor, settings, infer, metrics
        self._inside = 0  # requests
        self._held = 0  # bytes of their bodies

    @property
    def full(self) -> bool:
        """No more requests are taken at the moment."""
        return self._inside >= self._settings.max_queue

    async def predict(self, request: Request) -> Response:
        """The answer to a request, in time, or why there is none."""
        if self.full:
            raise _refusal()
        self._enter(1)
        whole = asyncio.Event()
        work = asyncio.create_task(self._answer(request, whole))
        try:
            await asyncio.wait((work,), timeout=self._settings.timeout)
            if work.done():
                return work.result()
            if whole.is_set():
                raise RequestError(504, f"no answer within {self._settings.timeout:g} seconds")
            raise RequestError(408, f"no whole request within {self._settings.timeout:g} seconds")
        finally:
            work.cancel()
            self._enter(-1)

    def _enter(self, count: int) -> None:
        self._inside += count
        self._metrics.inside(self._inside)

    async def _answer(self, request: Request, whole: asyncio.Event) -> Response:
        order: Order | None = None

        def prepare(quick: bool) -> tuple[list[Tensor], bool]:
            nonlocal order
            if quick and len(body) > _QUICK_BODY:
                raise NotQuickError
            order = parsed(request.headers.get("content-type", ""), body, self._settings.max_images)
            if quick and (order.dense or len(order.files) > 1):
                raise NotQuickError
            return self._images(order, quick), order.dense

        with contextlib.ExitStack() as stack:
            body = await self._body(request, stack)
            whole.set()
            predictions = await self._unless_gone(request, self._infer(prepare))
        assert order is not None
        top = min(order.top, self._predictor.arch.num_classes)
        results = [self._predictor.to_dict(prediction, top) for prediction in predictions]
        return Response(json.dumps({"results": results}), media_type="application/json")

    async def _body(self, request: Request, stack: contextlib.ExitStack) -> bytes:
        """The request's body, while the stack is open; refused as soon as it is known to be too large."""
        limit, body = self._settings.max_body, bytearray()
        declared = request.headers.get("content-length", "0")
        if not declared.isdigit() or len(declared) > 18 or int(declared) > limit:
            raise RequestError(413, f"a body may have up to {limit} bytes")
        stack.callback(lambda: self._hold(-len(body)))
        async for chunk in request.stream():
            body += chunk
            self._hold(len(chunk))
            if len(body) > limit:
                raise RequestError(413, f"a body may have up to {limit} bytes")
            if self._held > _BODIES * limit:
                raise _refusal()
        return bytes(body)

    def _hold(self, size: int) -> None:
        self._held += size

    def _images(self, order: Order, quick: bool) -> list[Tensor]:
        limit = self._settings.max_pixels
        images = []
        for place, file in enumerate(order.files):
            try:
                images.append(self._predictor.image(file, min(limit, _QUICK_PIXELS) if quick else limit))
            except PictureError as error:
                if quick and error.too_large:
                    raise NotQuickError from None
                # Why exactly it cannot be read are Pillow's words, which nobody has checked for secrets.
                status, why = (413, str(error)) if error.too_large else (422, "not a picture that can be read")
                raise RequestError(status, f"files[{place}]: {why}") from None
        return images

    @staticmethod
    async def _unless_gone(request: Request, predictions: Awaitable[list[Prediction]]) -> list[Prediction]:
        """The predictions; what still waits for them is dropped as soon as the client goes away."""
        work, gone = asyncio.ensure_future(predictions), asyncio.create_task(_left(request))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            return work.result()
        finally:
            work.cancel()
            gone.cancel()


async def _left(request: Request) -> None:
    """Returns when the client of a request that was read goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refusal() -> RequestError:
    return RequestError(503, "as many requests as may are waiting; try again later", {"Retry-After": "1"})


class _Door:
    """Every request passes it: it asks for the token, counts, and adds headers that every answer has."""

    def __init__(self, app: ASGIApp, token: str | None, metrics: Metrics, paths: Sequence[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)
        self._expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 499  # nginx's number for a client that left

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_SECURITY_HEADERS]
            await send(message)

        path = scope["path"]
        app = self._app if path in _OPEN or self._knows(scope) else _UNAUTHORISED
        try:
            await app(scope, receive, noted)
        except ClientDisconnect:
            pass
        except Exception:
            status = 500
            raise
        finally:
            seconds = time.perf_counter() - begun if path == "/v1/predict" and status == 200 else None
            self._metrics.request(path if path in self._paths else "other", status, seconds)

    def _knows(self, scope: Scope) -> bool:
        """Whether the request brings the token; comparing takes as long for any of the same length."""
        if self._expected is None:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)


_UNAUTHORISED = JSONResponse({"detail": "a token is needed: Authorization: Bearer TOKEN"}, 401,
                             {"WWW-Authenticate": "Bearer"})


def create_app(predictor: Predictor, settings: Settings | None = None, infer: Infer | None = None) -> FastAPI:
    """The application around a predictor.

    Args:
        predictor: of the network to serve.
        settings: limits and batching; the defaults of :class:`Settings`.
        infer: computes the images of a request instead of the application's own batcher, whose settings then don't
            count. It may tell ``app.state.on_batch`` the predictions of every batch, for the metrics.

    Returns:
        A FastAPI application. Its batcher runs between its lifespan's beginning and end.
    """
    settings = settings or Settings()
    metrics = Metrics(predictor.arch.num_blocks)
    batcher = Batcher(predictor.infer, settings.max_batch, settings.max_wait_ms / 1e3, metrics.batch)
    desk = _Desk(predictor, settings, infer or batcher, metrics)
    page = (resources.files("skipnet_rt.serving") / "page.html").read_bytes()
    described = {**predictor.describe(), "limits": {
        "body": settings.max_body, "pixels": settings.max_pixels, "images": settings.max_images,
        "seconds": settings.timeout}}

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        predictor.infer([torch.zeros(3, *predictor.arch.image_size)], dense=True)  # a first call takes longer
        async with contextlib.AsyncExitStack() as stack:
            if infer is None:
                await stack.enter_async_context(batcher)
            yield

    app = FastAPI(title="skipnet-rt", version=metadata.version("skipnet-rt"), lifespan=lifespan, docs_url=None,
                  redoc_url=None, redirect_slashes=False)
    app.state.on_batch = metrics.batch

    @app.get("/", include_in_schema=False)
    async def page_to_look_at() -> Response:
        return Response(page, media_type="text/html", headers=_PAGE_HEADERS)

    @app.post("/v1/predict", response_model=Results, responses=_PROBLEMS, openapi_extra={"requestBody": SCHEMA})
    async def predict(request: Request) -> Response:
        """The classes of pictures, and the route that each of them took."""
        return await desk.predict(request)

    @app.get("/v1/model")
    async def model() -> dict[str, Any]:
        """The network, what runs it, and the limits of a request."""
        return described

    @app.get("/healthz")
    async def healthy() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: _PROBLEMS[503]})
    async def ready() -> dict[str, str]:
        """Requests are taken."""
        if desk.full:
            raise _refusal()
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def counted() -> Response:
        """For Prometheus, in its text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> Response:
        return JSONResponse({"detail": error.detail}, error.status, error.headers)

    @app.exception_handler(Exception)
    async def apologise(request: Request, error: Exception) -> Response:
        return JSONResponse({"detail": "a mistake of the server's; its log says more"}, 500)

    app.add_middleware(_Door, token=settings.token, metrics=metrics,
                       paths=[route.path for route in app.routes if isinstance(route, Route)])
    return app
