"""Dynamic batching: images that wait at the same time are computed in one call of the engine.

A thread of a pool makes a request's images and puts them into the queue. If no other thread is computing, it works the
queue off itself: a lone request so changes threads twice, not four times, and its images stay in one core's cache. The
engine has threads of its own, so that a second call at the same time would only take cores from the first: whoever
comes meanwhile leaves its images in the queue. With no time to wait a batch is what came while the one before was
computed. It batches a loaded server and delays nobody on an idle one.

Where even two changes of threads would take as long as the work, and nobody else is there to be kept waiting, the event
loop's own thread does it.
"""

from __future__ import annotations

import asyncio
import math
import time
from bisect import insort
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from threading import Condition

from torch import Tensor

from skipnet_rt.serving.predictor import Prediction
from skipnet_rt.util.processors import processors

Compute = Callable[[Sequence[Tensor], bool], list[Prediction]]
"""The images of a batch and whether to compute them densely too; see :meth:`Predictor.infer`."""

Prepare = Callable[[bool], tuple[Sequence[Tensor], bool]]
"""Makes a request's images, and says whether to compute them densely too. Where it is told to be quick it must not take
long: if it would it raises :exc:`NotQuickError`, and is called again elsewhere. What else it raises, the request gets.
"""

QUICK = 2e-3
"""Seconds: a change of threads takes 0.2 to 0.4 ms where cores rest between requests."""


class NotQuickError(Exception):
    """What was to be prepared quickly is large."""


@dataclass(eq=False)
class _Request:
    """Its future is cancelled when nobody waits for it any more."""

    prepare: Prepare
    answer: asyncio.Future[list[Prediction]]
    number: int
    dense: bool = False
    left: int = 0  # images without a prediction
    predictions: list[Prediction] = field(default_factory=list)


@dataclass(eq=False)
class _Waiting:
    """An image in the queue."""

    request: _Request
    image: Tensor
    came: float = field(default_factory=time.monotonic)


class Batcher:
    """Called on an event loop, while it is entered there as a context; leaving it waits for all that was taken.

    Its length is how many images wait to be computed.

    Args:
        compute: computes a batch, in a thread of the batcher's.
        max_batch: images in a batch.
        max_wait: seconds that an image may wait for others, while its batch is not full.
        on_batch: told the predictions of every batch, on the event loop.
    """

    def __init__(self, compute: Compute, max_batch: int, max_wait: float,
                 on_batch: Callable[[list[Prediction]], None]) -> None:
        self._compute, self._max_batch, self._max_wait, self._on_batch = compute, max_batch, max_wait, on_batch
        self._queue: list[_Waiting] = []  # in the order of the requests, not in that of their being prepared
        self._changed = Condition()
        self._computing = self._stopping = False
        self._numbers = count()
        self._inside = 0  # requests
        self._lately = math.inf  # seconds that the last request took that was computed, and those that came meanwhile

    def __len__(self) -> int:
        return len(self._queue)

    async def __aenter__(self) -> Batcher:
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(processors() + 1, "skipnet-rt pictures")  # one of them computes
        return self

    async def __aexit__(self, *error: object) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        await asyncio.to_thread(self._threads.shutdown)

    async def __call__(self, prepare: Prepare) -> list[Prediction]:
        """The predictions of a request's images; they may be computed in several batches, and with others.

        Raises:
            Exception: what `prepare` or the computation raised.
        """
        request = _Request(prepare, self._loop.create_future(), next(self._numbers))
        self._inside += 1
        try:
            quick = self._inside == 1 and not self._computing and not self._max_wait and self._lately < QUICK
            if not quick or not self._work(request, quick=True):
                self._threads.submit(self._work, request)
            return await request.answer
        finally:
            self._inside -= 1

    def _work(self, request: _Request, quick: bool = False) -> bool:
        """Prepares a request and, if nobody else does, computes what is in the queue; whether it was quick enough."""
        begun = time.perf_counter()
        try:
            # Of what was not computed here the time says nothing.
            if not request.answer.cancelled() and self._prepared(request, quick) and self._compute_all():
                self._lately = time.perf_counter() - begun
        except NotQuickError:
            return False
        return True

    def _compute_all(self) -> bool:
        """Until the queue is empty; whether it was this thread that did."""
        with self._changed:
            if self._computing:
                self._changed.notify()  # it may be waiting for images
                return False
            self._computing = True
        while batch := self._next_batch():
            try:
                predictions = self._compute([each.image for each in batch], batch[0].request.dense)
            except Exception as error:  # those who wait are told
                self._loop.call_soon_threadsafe(self._fail, [each.request for each in batch], error)
            else:
                self._loop.call_soon_threadsafe(self._answer, batch, predictions)
        return True

    def _prepared(self, request: _Request, quick: bool) -> bool:
        """Puts a request's images into the queue; whether they could be made."""
        try:
            images, request.dense = request.prepare(quick)
        except NotQuickError:
            raise
        except Exception as error:
            self._loop.call_soon_threadsafe(self._fail, [request], error)
            return False
        request.left = len(images)
        with self._changed:
            for image in images:
                insort(self._queue, _Waiting(request, image), key=lambda each: each.request.number)
        return True

    def _next_batch(self) -> list[_Waiting]:
        """Waits for the next batch; an empty one is the end, and somebody else's turn to compute."""
        with self._changed:
            while True:
                self._queue = [each for each in self._queue if not each.request.answer.cancelled()]
                if not self._queue:
                    self._computing = False
                    return []
                left = min(each.came for each in self._queue) + self._max_wait - time.monotonic()
                if left <= 0 or len(self._queue) >= self._max_batch or self._stopping:
                    return self._taken()
                self._changed.wait(left)

    def _taken(self) -> list[_Waiting]:
        """The first in the queue and those behind it that can join; an image that is timed both ways stays alone."""
        size, dense = 1, self._queue[0].request.dense
        while size < min(len(self._queue), self._max_batch) and not dense and not self._queue[size].request.dense:
            size += 1
        batch, self._queue = self._queue[:size], self._queue[size:]
        return batch

    def _answer(self, batch: list[_Waiting], predictions: list[Prediction]) -> None:
        self._on_batch(predictions)
        for each, prediction in zip(batch, predictions, strict=True):
            request = each.request
            request.predictions.append(prediction)
            request.left -= 1
            if not request.left and not request.answer.done():
                request.answer.set_result(request.predictions)

    def _fail(self, requests: Sequence[_Request], error: Exception) -> None:
        for request in requests:
            if not request.answer.done():
                request.answer.set_exception(error)
