"""An application on a socket of this machine, until a signal ends it."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable
from contextlib import closing
from types import FrameType
from typing import Any

from skipnet_rt.serving.settings import Settings

try:
    import uvicorn

    from skipnet_rt.serving.protocol import bounded
except ImportError as error:
    raise ImportError(f"the server needs {(error.name or str(error)).partition('.')[0]}; "
                      "install it with: pip install 'skipnet-rt[serve]'") from None


def listening(host: str, port: int) -> socket.socket:
    """A socket that takes connections; port 0 for any that is free.

    Raises:
        OSError: the address is not this machine's, or is in use.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family, backlog=1024)


def configured(app: Any, settings: Settings) -> uvicorn.Server:
    """A server for an application with these settings, on one process and one event loop."""
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every form that is malformed
    return uvicorn.Server(uvicorn.Config(
        app, http=bounded(settings), ws="none", lifespan="on", log_level="warning", access_log=False,
        server_header=False, proxy_headers=False,
        # Every request has a limit of its own; the margin is for those who read its answer slowly.
        timeout_graceful_shutdown=round(settings.timeout) + 5))


def serve(app: Any, listener: socket.socket, settings: Settings, on_start: Callable[[], None]) -> None:
    """Answer requests until SIGTERM or SIGINT; then answer what was taken, and return.

    Args:
        app: of :func:`skipnet_rt.serving.app.create_app`.
        listener: of :func:`listening`; it is closed.
        settings: the application's.
        on_start: called when requests are about to be taken.

    Raises:
        KeyboardInterrupt: it was SIGINT.
    """
    server = configured(app, settings)

    def stop(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    before = signal.signal(signal.SIGTERM, stop)  # before uvicorn has its own; after all is done it raises it again
    try:
        with closing(listener):
            on_start()
            server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
