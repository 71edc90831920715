"""An application on a socket of this machine, until a signal ends it."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Callable
from contextlib import closing
from typing import Any

from skipnet_rt.serving.settings import Settings

try:
    import uvicorn
except ImportError as error:
    raise ImportError(f"the server needs {error.name}; install it with: pip install 'skipnet-rt[serve]'") from None


def listening(host: str, port: int) -> socket.socket:
    """A socket that takes connections; port 0 for any that is free.

    Raises:
        OSError: the address is not this machine's, or is in use.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family, backlog=1024)


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
    server = uvicorn.Server(uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, ws="none", lifespan="on",
        # What was taken has its own limit; the margin is for writing the answer.
        timeout_graceful_shutdown=round(settings.timeout) + 5))
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when all is done
    try:
        with closing(listener):
            on_start()
            server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
    if not server.started:
        sys.exit(1)  # uvicorn has said why
