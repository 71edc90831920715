"""Clients of a server, all in this process, for serving.py: orders come as JSON on standard input, results go out so.

It imports nothing of ours, so that it takes as little as it can of the cores that it shares with the server.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Sequence
from statistics import quantiles
from typing import Any

BOUNDARY = b"picture-boundary"


def request(picture: bytes) -> bytes:
    """A picture as a form, in a whole request."""
    body = (b'--%b\r\nContent-Disposition: form-data; name="files"; filename="p"\r\nContent-Type: image/*\r\n\r\n%b\r\n'
            b"--%b--\r\n" % (BOUNDARY, picture, BOUNDARY))
    return (b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=%b\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (BOUNDARY, len(body), body))


class Client(asyncio.Protocol):
    """A connection that asks again when it is answered.

    Args:
        load: what all clients share.
        number: of this one.
    """

    def __init__(self, load: Load, number: int) -> None:
        self.load, self.number, self.got = load, number, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        """The next request, if there is to be one."""
        self.waiting = self.load.next(self.number)
        if self.waiting is None:
            self.transport.close()
            return
        self.begun = time.perf_counter()
        self.transport.write(self.load.requests[self.waiting])

    def data_received(self, data: bytes) -> None:
        self.got += data
        head, end, body = self.got.partition(b"\r\n\r\n")
        if end and len(body) >= int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]):
            self.got = b""
            assert self.waiting is not None
            self.load.answered(self.waiting, time.perf_counter() - self.begun, int(head[9:12]), body)
            self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self.load.left(lost=self.waiting is not None)


class Load:
    """Requests until there are enough, or the time is up.

    Args:
        port: the server's.
        pictures: the files to send, in turns.
        concurrency: clients.
        seconds, count: where to stop.
    """

    def __init__(self, port: int, pictures: Sequence[bytes], concurrency: int, seconds: float, count: int) -> None:
        self.port, self.concurrency, self.count = port, concurrency, count
        self.requests, self.seconds = [request(picture) for picture in pictures], seconds
        self.expected: dict[int, bytes] = {}
        self.statuses: Counter[str] = Counter()
        self.latencies: list[float] = []
        self.sent = 0

    def next(self, number: int) -> int | None:
        """Which picture comes next; None at the end."""
        if self.sent >= self.count or time.perf_counter() > self.end:
            return None
        self.sent += 1
        return (self.sent + number) % len(self.requests)

    def answered(self, picture: int, seconds: float, status: int, body: bytes) -> None:
        """Note an answer. All before the milliseconds has to be as in a picture's first answer."""
        if status == 200:
            essence = body.partition(b', "milliseconds"')[0]
            if self.expected.setdefault(picture, essence) != essence:
                self.statuses["another answer"] += 1
                return
        self.statuses[str(status)] += 1
        self.latencies.append(seconds)

    def left(self, *, lost: bool) -> None:
        """A client's connection was closed: by itself, or with a request that was not answered."""
        self.statuses["lost"] += lost
        self.open -= 1
        if not self.open:
            self.over.set_result(None)

    async def run(self) -> dict[str, Any]:
        """One round alone, for the expected answers, and then all clients; what they saw."""
        loop = asyncio.get_running_loop()
        concurrency, count, self.concurrency = self.concurrency, self.count, 1
        self.count = len(self.requests)
        await self._all(loop)
        self.concurrency, self.count, self.sent, self.latencies = concurrency, count, 0, []
        self.statuses.clear()
        begun = time.perf_counter()
        await self._all(loop)
        taken = time.perf_counter() - begun
        shares = quantiles((1e3 * seconds for seconds in self.latencies), n=100)
        return {"concurrency": concurrency, "sent": self.sent,
                "answers": {kind: count for kind, count in self.statuses.items() if count}, "seconds": taken,
                "requests_per_second": len(self.latencies) / taken,
                "p25": shares[24], "p50": shares[49], "p99": shares[98]}

    async def _all(self, loop: asyncio.AbstractEventLoop) -> None:
        self.open, self.over, self.end = self.concurrency, loop.create_future(), time.perf_counter() + self.seconds
        for number in range(self.concurrency):
            await loop.create_connection(lambda number=number: Client(self, number),  # type: ignore[misc]
                                         "127.0.0.1", self.port)
        await self.over


def main() -> None:
    """Carry the orders out."""
    orders = json.load(sys.stdin)
    load = Load(orders["port"], [b64decode(picture) for picture in orders["pictures"]], orders["concurrency"],
                orders["seconds"], orders["requests"])
    print(json.dumps(asyncio.run(load.run())))


if __name__ == "__main__":
    main()
