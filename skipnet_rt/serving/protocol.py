"""HTTP with limits on what comes before, beside and after a request's body, which the application never sees.

uvicorn bounds neither the bytes of a head nor the time that it takes, nor what follows an answer that was given early.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from skipnet_rt.serving.settings import Settings

_HEAD = 2**16  # bytes of a head, besides those that came with its first


class BoundedProtocol(HttpToolsProtocol):
    """Closes a connection whose next request is too long, or takes too long to come.

    Attributes:
        max_bytes: of a whole request.
        max_seconds: from a connection's or a request's first byte to the request's last.
    """

    max_bytes: ClassVar[int]
    max_seconds: ClassVar[float]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._bytes, self._in_head = 0, True
        self._limit = self.loop.call_later(self.max_seconds, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._bytes += len(data)
        super().data_received(data)
        if self._bytes > (_HEAD if self._in_head else self.max_bytes):
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._bytes, self._in_head = 0, True
        self._limit.cancel()
        self._limit = self.loop.call_later(self.max_seconds, self.transport.close)

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._limit.cancel()
        self._bytes = 0
        super().on_message_complete()


def bounded(settings: Settings) -> type[Any]:
    """A protocol with a server's limits."""
    # The application answers at half of it, and a second earlier: the client had better read why than be cut off.
    return type("Bounded", (BoundedProtocol,), {"max_bytes": 2 * (settings.max_body + _HEAD),
                                                "max_seconds": settings.timeout + 1})
