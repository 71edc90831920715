"""Dynamic batching: images that wait at the same time are computed in one call of the engine.

The event loop puts images into a queue, and one thread works it off: the engine has threads of its own, so that a
second call at the same time would only take cores from the first. With no time to wait a batch is what came while
the one before was computed. It batches a loaded server and delays nobody on an idle one.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Condition, Thread

from torch import Tensor

from skipnet_rt.serving.predictor import Prediction

Compute = Callable[[Sequence[Tensor], bool], list[Prediction]]
"""The images of a batch and whether to compute them densely too; see :meth:`Predictor.infer`."""


@dataclass(eq=False)
class _Waiting:
    """An image in the queue. Its future is cancelled when nobody waits for it any more."""

    image: Tensor
    dense: bool
    answer: asyncio.Future[Prediction]
    came: float = field(default_factory=time.monotonic)


class Batcher:
    """Called on an event loop, while it is entered there as a context; leaving it waits for the queue to be empty.

    Args:
        compute: computes a batch, in a thread of the batcher's.
        max_batch: images in a batch.
        max_wait: seconds that an image may wait for others, while its batch is not full.
        on_batch: told the predictions of every batch, on the event loop.
    """

    def __init__(self, compute: Compute, max_batch: int, max_wait: float,
                 on_batch: Callable[[list[Prediction]], None]) -> None:
        self._compute, self._max_batch, self._max_wait, self._on_batch = compute, max_batch, max_wait, on_batch
        self._queue: deque[_Waiting] = deque()
        self._changed = Condition()
        self._stopping = False

    async def __aenter__(self) -> Batcher:
        self._loop = asyncio.get_running_loop()
        self._thread = Thread(target=self._work, name="skipnet-rt batches", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    async def __call__(self, images: Sequence[Tensor], dense: bool) -> list[Prediction]:
        """The predictions of some images; they may be computed in several batches, and with others."""
        waiting = [_Waiting(image, dense, self._loop.create_future()) for image in images]
        with self._changed:
            self._queue.extend(waiting)
            self._changed.notify()
        return list(await asyncio.gather(*(each.answer for each in waiting)))

    def _work(self) -> None:
        while batch := self._next_batch():
            try:
                predictions = self._compute([each.image for each in batch], batch[0].dense)
            except Exception as error:  # those who wait are told
                self._loop.call_soon_threadsafe(self._fail, batch, error)
            else:
                self._loop.call_soon_threadsafe(self._answer, batch, predictions)

    def _next_batch(self) -> list[_Waiting]:
        """Waits for the next batch; an empty one is the end."""
        with self._changed:
            while True:
                self._drop_abandoned()
                if self._queue:
                    left = self._queue[0].came + self._max_wait - time.monotonic()
                    if left <= 0 or len(self._queue) >= self._max_batch or self._stopping:
                        return self._taken()
                    self._changed.wait(left)
                elif self._stopping:
                    return []
                else:
                    self._changed.wait()

    def _drop_abandoned(self) -> None:
        if any(each.answer.cancelled() for each in self._queue):
            self._queue = deque(each for each in self._queue if not each.answer.cancelled())

    def _taken(self) -> list[_Waiting]:
        """The first in the queue and those behind it that can join; an image that is timed both ways stays alone."""
        batch = [self._queue.popleft()]
        while self._queue and len(batch) < self._max_batch and not batch[0].dense and not self._queue[0].dense:
            batch.append(self._queue.popleft())
        return batch

    def _answer(self, batch: list[_Waiting], predictions: list[Prediction]) -> None:
        self._on_batch(predictions)
        for each, prediction in zip(batch, predictions, strict=True):
            if not each.answer.done():
                each.answer.set_result(prediction)

    def _fail(self, batch: list[_Waiting], error: Exception) -> None:
        for each in batch:
            if not each.answer.done():
                each.answer.set_exception(error)
