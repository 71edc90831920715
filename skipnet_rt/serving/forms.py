"""What a request asks for: from its body, multipart or JSON, to pictures and options."""

from __future__ import annotations

import binascii
import json
from base64 import b64decode
from dataclasses import dataclass
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header


class RequestError(Exception):
    """A request that cannot be answered.

    Attributes:
        status: of the HTTP answer.
        detail: why, in one line.
        headers: of the answer.
    """

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


@dataclass(frozen=True)
class Order:
    """What a request asks for.

    Attributes:
        files: the pictures' files.
        top: classes of each picture to return, at least 1.
        dense: time it with every block forced to run, too.
    """

    files: list[bytes]
    top: int
    dense: bool


_OPTIONS = {"top", "dense"}

SCHEMA: dict[str, Any] = {"required": True, "content": {
    "multipart/form-data": {
        "schema": {"type": "object", "required": ["files"], "additionalProperties": False, "properties": {
            "files": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"},
                      "description": "Picture files: the field may be given several times."},
            "top": {"type": "integer", "minimum": 1, "default": 5, "description": "Classes to return of each."},
            "dense": {"type": "boolean", "default": False,
                      "description": "Time each picture with every block forced to run, too."}}},
        "encoding": {"files": {"contentType": "image/*"}}},
    "application/json": {
        "schema": {"type": "object", "required": ["files"], "additionalProperties": False, "properties": {
            "files": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "byte"},
                      "description": "Picture files in base64."},
            "top": {"type": "integer", "minimum": 1, "default": 5},
            "dense": {"type": "boolean", "default": False}}}},
}}
"""Of both kinds of body, for OpenAPI."""


def parsed(content_type: str, body: bytes, max_images: int) -> Order:
    """What a body asks for.

    Raises:
        RequestError: 415 for another content type, 413 for too many pictures, 400 for anything else that is wrong.
    """
    kind, parameters = parse_options_header(content_type)
    if kind == b"multipart/form-data":
        fields = _multipart(parameters.get(b"boundary", b""), body, max_images)
        files, options = [value for name, value in fields if name == "files"], _form_options(fields)
    elif kind == b"application/json":
        files, options = _json(body, max_images)
    else:
        raise RequestError(415, "a request is multipart/form-data with the field 'files', or application/json")
    if not files:
        raise RequestError(400, "a request needs at least one picture in 'files'")
    return Order(files, **options)


def _too_many(max_images: int) -> RequestError:
    return RequestError(413, f"a request may have up to {max_images} pictures, this one has more")


def _multipart(boundary: bytes, body: bytes, max_images: int) -> list[tuple[str, bytes]]:
    """The parts' names and contents, in order. Starlette's own parser would write large files to the disk."""
    parts: list[tuple[str, bytes]] = []
    name, value, disposition, content, ended = b"", b"", b"", bytearray(), False

    def on_header_field(data: bytes, start: int, end: int) -> None:
        nonlocal name
        name += data[start:end]

    def on_header_value(data: bytes, start: int, end: int) -> None:
        nonlocal value
        value += data[start:end]

    def on_header_end() -> None:
        nonlocal name, value, disposition
        if name.lower() == b"content-disposition":
            disposition = value
        name, value = b"", b""

    def on_part_data(data: bytes, start: int, end: int) -> None:
        content.extend(data[start:end])

    def on_part_end() -> None:
        nonlocal disposition
        _, parameters = parse_options_header(disposition.decode("latin-1"))
        parts.append((parameters.get(b"name", b"").decode("latin-1"), bytes(content)))
        if len(parts) > max_images + len(_OPTIONS):  # at once: a million small ones take long to parse
            raise _too_many(max_images)
        disposition = b""
        content.clear()

    def on_end() -> None:
        nonlocal ended
        ended = True

    try:
        parser = MultipartParser(boundary, {
            "on_header_field": on_header_field, "on_header_value": on_header_value, "on_header_end": on_header_end,
            "on_part_data": on_part_data, "on_part_end": on_part_end, "on_end": on_end})
        parser.write(body)
    except FormParserError:
        raise RequestError(400, "the body is not multipart/form-data as its header says") from None
    if not ended:
        raise RequestError(400, "the body ends before its last boundary")
    if sum(name == "files" for name, _ in parts) > max_images:
        raise _too_many(max_images)
    return parts


def _form_options(fields: list[tuple[str, bytes]]) -> dict[str, Any]:
    """The options among a form's fields; fields that nobody knows are an error, for they were meant to do something."""
    texts = {name: value for name, value in fields if name != "files"}
    if unknown := set(texts) - _OPTIONS:
        raise RequestError(400, f"unknown field {sorted(unknown)[0]!r}; known: files, top, dense")
    top, dense = texts.get("top", b"5"), texts.get("dense", b"false").lower()
    if not top.isdigit() or len(top) > 6 or dense not in (b"true", b"false"):
        raise RequestError(400, "'top' must be a positive integer and 'dense' true or false")
    return _options(int(top), dense == b"true")


def _json(body: bytes, max_images: int) -> tuple[list[bytes], dict[str, Any]]:
    # Python would take seconds for a list of millions, and do nothing else meanwhile. Base64 has no commas.
    if body.count(b",") > max_images + len(_OPTIONS):
        raise _too_many(max_images)
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError(400, "the body is not JSON") from None
    if not isinstance(document, dict) or not isinstance(document.get("files"), list):
        raise RequestError(400, "the body must be an object with 'files', a list of pictures in base64")
    if len(document["files"]) > max_images:
        raise _too_many(max_images)
    if unknown := set(document) - {"files"} - _OPTIONS:
        raise RequestError(400, f"unknown key {sorted(unknown)[0]!r}; known: files, top, dense")
    top, dense = document.get("top", 5), document.get("dense", False)
    if type(top) is not int or type(dense) is not bool:
        raise RequestError(400, "'top' must be a positive integer and 'dense' true or false")
    try:
        return [b64decode(text, validate=True) for text in document["files"]], _options(top, dense)
    except (TypeError, ValueError, binascii.Error):
        raise RequestError(400, "'files' must be pictures in base64") from None


def _options(top: int, dense: bool) -> dict[str, Any]:
    if top < 1:
        raise RequestError(400, "'top' must be a positive integer and 'dense' true or false")
    return {"top": top, "dense": dense}
