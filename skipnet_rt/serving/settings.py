"""What a server allows: limits on what comes in, and how requests become batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Of one server.

    Attributes:
        max_batch: images in one call of the engine; 1: no batching.
        max_wait_ms: milliseconds that an image waits for others to join its batch. With 0 a batch is what has come
            while the one before was computed.
        max_queue: requests taken and not answered yet; beyond it they are refused with 503.
        max_body: bytes of a request's body.
        max_pixels: of a picture, before and after it is resized.
        max_images: of a request.
        timeout: seconds from a request's first byte to its answer.
        token: what ``Authorization: Bearer`` must bring; None: nothing is asked for.
    """

    max_batch: int = 32
    max_wait_ms: float = 0.0
    max_queue: int = 128
    max_body: int = 16 * 2**20
    max_pixels: int = 25_000_000
    max_images: int = 16
    timeout: float = 30.0
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "max_body", "max_pixels", "max_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.max_wait_ms < float("inf"):
            raise ValueError(f"max_wait_ms must be 0 or more, got {self.max_wait_ms}")
        if not 0 < self.timeout < float("inf"):
            raise ValueError(f"timeout must be positive, got {self.timeout}")
        if self.token == "":
            raise ValueError("token must not be empty")


def read_token(path: Path) -> str:
    """The bearer token in a file: its text without white space around it.

    Raises:
        ValueError: that is no token.
        OSError: the file cannot be read.
    """
    token = path.read_text(encoding="utf-8", errors="replace").strip()
    if not token.isascii() or not token.isprintable() or not token or " " in token:
        raise ValueError(f"{path}: a token is one line of printable ASCII without spaces")
    return token
