"""Dynamic batching, with a computation that the tests hold up and let go."""

import asyncio
import math
import threading
import time

import pytest
import torch

from skipnet_rt.serving import batching
from skipnet_rt.serving.batching import Batcher, NotQuickError
from skipnet_rt.serving.predictor import Prediction
from skipnet_rt.util.processors import processors


class Computation:
    """Notes its batches; waits while it is held up."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.sizes: list[int] = []  # of those that succeeded
        self.denses: list[bool] = []
        self.begun, self.free = threading.Semaphore(0), threading.Event()
        self.free.set()
        self.error: Exception | None = None

    def __call__(self, images, dense):
        self.batches.append([int(image) for image in images])
        self.denses.append(dense)
        self.begun.release()
        assert self.free.wait(30)
        if self.error:
            raise self.error
        self.sizes.append(len(images))
        return [Prediction((float(image),), (True,), 1.0, 1, 1.0, len(images)) for image in images]

    async def hold(self, batcher):
        """Hold it up with image -1, so that others wait."""
        self.free.clear()
        first = asyncio.ensure_future(ask(batcher, -1))
        await asyncio.to_thread(self.begun.acquire)
        return first


async def ask(batcher, *numbers, dense=False):
    predictions = await batcher(lambda quick: ([torch.tensor(number) for number in numbers], dense))
    return [int(prediction.probabilities[0]) for prediction in predictions]


async def waiting(batcher, count):
    """Until so many images are in the queue, where threads bring them."""
    while len(batcher) < count:
        await asyncio.sleep(0.001)


def run(scenario, max_batch=4, max_wait=0.0):
    """Runs a scenario with a batcher and its computation; returns the computation."""
    async def main():
        seen = []
        async with Batcher(computation, max_batch, max_wait, lambda predictions: seen.append(len(predictions))) as one:
            await asyncio.wait_for(scenario(one, computation), 60)
        assert seen == computation.sizes

    computation = Computation()
    asyncio.run(main())
    return computation


def test_an_idle_batcher_computes_at_once():
    async def scenario(batcher, computation):
        assert await ask(batcher, 5) == [5]
        assert await ask(batcher, 6) == [6]

    assert run(scenario).batches == [[5], [6]]


def test_what_comes_during_a_batch_is_the_next_in_its_order():
    async def scenario(batcher, computation):
        first = await computation.hold(batcher)
        others = [asyncio.ensure_future(ask(batcher, *numbers)) for numbers in ((0,), (1, 2), (3, 4, 5), (6,))]
        await waiting(batcher, 7)
        computation.free.set()
        assert await first == [-1]
        assert await asyncio.gather(*others) == [[0], [1, 2], [3, 4, 5], [6]]

    assert run(scenario).batches == [[-1], [0, 1, 2, 3], [4, 5, 6]]


def test_a_full_batch_does_not_wait():
    async def scenario(batcher, computation):
        assert await asyncio.gather(*(ask(batcher, number) for number in range(8))) == [[n] for n in range(8)]

    batches = run(scenario, max_wait=1000.0).batches
    assert [len(batch) for batch in batches] == [4, 4]  # of those that were prepared first
    assert sorted(batches[0] + batches[1]) == list(range(8))


def test_a_batch_that_stays_small_waits_no_longer_than_it_may():
    async def scenario(batcher, computation):
        assert await ask(batcher, 1, 2) == [1, 2]

    assert run(scenario, max_wait=0.02).batches == [[1, 2]]


def test_an_image_that_is_timed_both_ways_stays_alone():
    async def scenario(batcher, computation):
        first = await computation.hold(batcher)
        others = [asyncio.ensure_future(ask(batcher, 1)), asyncio.ensure_future(ask(batcher, 2, 3, dense=True)),
                  asyncio.ensure_future(ask(batcher, 4))]
        await waiting(batcher, 4)
        computation.free.set()
        await asyncio.gather(first, *others)

    computation = run(scenario)
    assert computation.batches == [[-1], [1], [2], [3], [4]]
    assert computation.denses == [False, False, True, True, False]


def test_images_that_nobody_waits_for_are_not_computed():
    async def scenario(batcher, computation):
        first = await computation.hold(batcher)
        others = [asyncio.ensure_future(ask(batcher, *numbers)) for numbers in ((0, 1), (2,), (3, 4, 5))]
        await waiting(batcher, 6)
        others[0].cancel()
        others[2].cancel()
        await asyncio.sleep(0)
        computation.free.set()
        assert await first == [-1]
        assert await others[1] == [2]

    assert run(scenario).batches == [[-1], [2]]


def test_images_abandoned_while_they_are_computed_disturb_nobody():
    async def scenario(batcher, computation):
        first = await computation.hold(batcher)
        first.cancel()
        second = asyncio.ensure_future(ask(batcher, 7))
        await waiting(batcher, 1)
        computation.free.set()
        assert await second == [7]

    assert run(scenario).batches == [[-1], [7]]


def test_an_error_reaches_those_who_wait_for_its_batch_and_no_others():
    async def scenario(batcher, computation):
        computation.error = RuntimeError("out of order")
        failed = await asyncio.gather(ask(batcher, 1, 2), ask(batcher, 3), return_exceptions=True)
        assert [str(error) for error in failed] == ["out of order"] * 2
        computation.error = None
        assert await ask(batcher, 4, 5, 6) == [4, 5, 6]

    assert run(scenario, max_batch=3, max_wait=1000.0).batches == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("max_wait", [0.0, 1000.0])
def test_leaving_waits_for_what_was_taken(max_wait):
    computation = Computation()

    async def main():
        async with Batcher(computation, 4, max_wait, lambda predictions: None) as batcher:
            waiting = [asyncio.ensure_future(ask(batcher, number)) for number in range(6)]
            await asyncio.sleep(0)
        assert await asyncio.gather(*waiting) == [[number] for number in range(6)]

    asyncio.run(main())
    assert sorted(number for batch in computation.batches for number in batch) == list(range(6))


def test_what_cannot_be_prepared_is_its_own_requests_matter():
    def impossible(quick):
        raise ValueError("no picture")

    async def scenario(batcher, computation):
        failed, answered = await asyncio.gather(batcher(impossible), ask(batcher, 1), return_exceptions=True)
        assert str(failed) == "no picture"
        assert answered == [1]

    assert run(scenario).batches == [[1]]


def test_what_nobody_waits_for_any_more_is_not_prepared():
    prepared, held = [], threading.Event()

    def hold_all(quick):
        assert held.wait(30)
        return [torch.tensor(0)], False

    async def scenario(batcher, computation):
        holding = [asyncio.ensure_future(batcher(hold_all)) for _ in range(processors() + 1)]
        late = asyncio.ensure_future(batcher(lambda quick: (prepared.append(1), False)))
        await asyncio.sleep(0)
        late.cancel()
        await asyncio.sleep(0)
        held.set()
        await asyncio.gather(*holding)

    run(scenario)
    assert not prepared


def test_one_batch_is_computed_at_a_time():
    computing, most = [], []

    def compute(images, dense):
        computing.append(1)
        most.append(len(computing))
        time.sleep(0.001)
        computing.pop()
        return [Prediction((float(image),), (True,), 1.0, 1, 1.0, len(images)) for image in images]

    async def main():
        async with Batcher(compute, 2, 0.0, lambda predictions: None) as batcher:
            assert await asyncio.gather(*(ask(batcher, number) for number in range(50))) == [[n] for n in range(50)]

    asyncio.run(main())
    assert max(most) == 1


class Whereabouts:
    """Takes some seconds, and notes whether it did in the thread that made it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.here: list[bool] = []
        self.thread = threading.current_thread()

    def __call__(self, images, dense):
        time.sleep(self.seconds)
        self.here.append(threading.current_thread() is self.thread)
        return [Prediction((float(image),), (True,), 1.0, 1, 1.0, len(images)) for image in images]


def whereabouts(scenario, max_wait=0.0, seconds=0.0, quick=False):
    """Whether each batch of a scenario was computed in the event loop's own thread.

    `quick` begins it when that has happened for the first time: after that no thread is still busy with itself.
    """
    async def main():
        async with Batcher(compute, 4, max_wait, lambda predictions: None) as batcher:
            while not compute.here or (quick and not compute.here[-1]):
                await ask(batcher, 0)
            before = len(compute.here)
            await scenario(batcher)
        return compute.here[before:]

    compute = Whereabouts(seconds)
    return asyncio.run(asyncio.wait_for(main(), 60))


@pytest.fixture
def all_is_quick(monkeypatch):
    """However busy the machine is."""
    monkeypatch.setattr(batching, "QUICK", math.inf)


async def five_in_turn(batcher):
    for number in range(5):
        assert await ask(batcher, number) == [number]


@pytest.mark.usefixtures("all_is_quick")
def test_a_lone_request_changes_no_threads_once_one_was_quick():
    assert whereabouts(five_in_turn, quick=True) == [True] * 5
    assert not any(whereabouts(five_in_turn, max_wait=1e-6))  # nothing may wait in that thread


def test_the_event_loop_does_nothing_that_takes_long():
    assert not any(whereabouts(five_in_turn, seconds=batching.QUICK))


def test_what_fails_at_once_does_not_make_the_next_request_quick():
    def impossible(quick):
        raise ValueError("no picture")

    async def scenario(batcher):
        for number in range(5):
            with pytest.raises(ValueError, match="no picture"):
                await batcher(impossible)
            await asyncio.sleep(0.01)  # until that thread is done
            assert await ask(batcher, number) == [number]

    assert not any(whereabouts(scenario, seconds=batching.QUICK))


@pytest.mark.usefixtures("all_is_quick")
def test_what_says_that_it_takes_long_is_prepared_in_another_thread():
    places = []

    def large(quick):
        places.append(threading.current_thread())
        if quick:
            raise NotQuickError
        return [torch.tensor(7)], False

    async def scenario(batcher):
        assert (await batcher(large))[0].probabilities == (7.0,)

    assert whereabouts(scenario, quick=True) == [False]
    assert [place is threading.current_thread() for place in places] == [True, False]


@pytest.mark.usefixtures("all_is_quick")
def test_requests_that_are_not_alone_change_threads():
    async def scenario(batcher):
        assert await asyncio.gather(*(ask(batcher, number) for number in range(10))) == [[n] for n in range(10)]

    assert sum(whereabouts(scenario, quick=True)) == 1  # the first of them was alone still
