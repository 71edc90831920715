"""A server in a thread of this process, on a free port of this machine, and what is sent to it."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

import torch
from PIL import Image

from skipnet_rt.serving import Prediction, Predictor, Settings
from skipnet_rt.serving.app import Infer, create_app
from skipnet_rt.serving.batching import QUICK
from skipnet_rt.serving.server import configured, listening

BOUNDARY = "a-boundary"


@dataclass(frozen=True)
class Answer:
    """A server's."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body)


@dataclass(frozen=True)
class Served:
    """Where a server listens."""

    port: int

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """One request on a connection of its own; ``content_type="..."`` becomes Content-Type."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return Answer(response.status, {name.lower(): value for name, value in response.getheaders()},
                          response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def predict(self, *files: bytes, **fields: str) -> Answer:
        """Files and fields as a form."""
        return self.ask("POST", "/v1/predict", form(files, **fields), **FORM)

    def predict_json(self, document: object) -> Answer:
        return self.ask("POST", "/v1/predict", json.dumps(document).encode(), content_type="application/json")

    def raw(self, data: bytes = b"") -> socket.socket:
        """A connection over which this has been sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(data)
        return connection


FORM = {"content_type": f"multipart/form-data; boundary={BOUNDARY}"}


def form(files: Sequence[bytes], **fields: str) -> bytes:
    """A multipart body."""
    parts = [*((f'name="{name}"', value.encode()) for name, value in fields.items()),
             *(('name="files"; filename="picture"\r\nContent-Type: application/octet-stream', file) for file in files)]
    lines = b"".join(b"--%b\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (
        BOUNDARY.encode(), head.encode(), value) for head, value in parts)
    return lines + b"--%b--\r\n" % BOUNDARY.encode()


def request(body: bytes, **headers: str) -> bytes:
    """A whole request for predictions, as bytes."""
    lines = {"host": "localhost", "content_length": str(len(body)), **FORM, **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items() if value)
    return f"POST /v1/predict HTTP/1.1\r\n{head}\r\n".encode() + body


def png(picture: Image.Image) -> bytes:
    """A picture as a PNG file."""
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@contextmanager
def served(predictor: Predictor, settings: Settings | None = None, infer: Infer | None = None) -> Iterator[Served]:
    """A server around a predictor."""
    settings = settings or Settings()
    server, listener = configured(create_app(predictor, settings, infer), settings), listening("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        until = time.monotonic() + 60
        while not server.started and thread.is_alive() and time.monotonic() < until:
            time.sleep(0.005)
        assert server.started
        yield Served(listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not end"


class Held(Predictor):
    """Computes only while it is let, and fails where it is told to; notes the sizes of its batches."""

    def __init__(self, *arguments: object, **options: object) -> None:
        self.free, self.sizes = threading.Event(), []
        self.error: Exception | None = None
        self.free.set()
        super().__init__(*arguments, **options)

    def infer(self, images: Sequence[torch.Tensor], dense: bool = False) -> list[Prediction]:
        self.sizes.append(len(images))
        time.sleep(2 * QUICK)  # the event loop had better not wait for it itself
        assert self.free.wait(60)
        if self.error:
            raise self.error
        return super().infer(images, dense)


def wait_until(true: object, seconds: float = 30) -> None:
    """Until a function returns something true."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "never came true"
        time.sleep(0.005)
