"""``skipnet-rt serve``."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated

import torch
import typer

from skipnet_rt.cli.console import out, say
from skipnet_rt.cli.options import (
    AskedPreprocessing,
    CommandError,
    Device,
    DTypeName,
    ModelPath,
    chosen_preprocessing,
)
from skipnet_rt.engines.registry import engines
from skipnet_rt.serving import Predictor, Settings
from skipnet_rt.serving.settings import read_token


def serve_command(
        model_path: ModelPath = None,
        host: Annotated[str, typer.Option(help="The address to listen on; this machine alone reaches the default."),
                        ] = "127.0.0.1",
        port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8000,
        token_file: Annotated[Path | None, typer.Option(
            metavar="FILE", help="Ask for the bearer token in this file.")] = None,
        engine: Annotated[str, typer.Option(
            metavar="NAME", help=f"The engine: auto, {', '.join(engines())}.")] = "auto",
        device: Device = "cpu",
        dtype: Annotated[DTypeName, typer.Option(help="Of weights and activations.")] = DTypeName.float32,
        threads: Annotated[int | None, typer.Option(min=1, help="Of the engine.", show_default="PyTorch's")] = None,
        preprocessing: AskedPreprocessing = None,
        max_batch: Annotated[int, typer.Option(
            min=1, help="Images in one call of the engine; 1: no batching.")] = Settings.max_batch,
        max_wait_ms: Annotated[float, typer.Option(
            min=0, help="Milliseconds that an image waits for others to join it; 0: a batch is what came during "
                        "the one before.")] = Settings.max_wait_ms,
        max_queue: Annotated[int, typer.Option(
            min=1, help="Requests taken and not answered yet; beyond it they are refused with 503."),
        ] = Settings.max_queue,
        max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = Settings.max_body,
        max_pixels: Annotated[int, typer.Option(min=1, help="Of a picture.")] = Settings.max_pixels,
        max_images: Annotated[int, typer.Option(min=1, help="Of a request.")] = Settings.max_images,
        timeout: Annotated[float, typer.Option(min=0.001, help="Seconds for a request.")] = Settings.timeout,
) -> None:
    """Answer requests over HTTP, with a page to try it at /. SIGTERM ends it when all requests are answered."""
    settings = Settings(max_batch, max_wait_ms, max_queue, max_body, max_pixels, max_images, timeout,
                        _token(token_file))
    try:
        from skipnet_rt.serving.app import create_app
        from skipnet_rt.serving.server import listening, serve
    except ImportError as error:
        raise CommandError(str(error)) from None
    try:
        listener = listening(host, port)
    except OSError as error:
        raise CommandError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    predictor = Predictor(model_path, engine, getattr(torch, dtype.value), threads, device=device,
                          preprocessing=chosen_preprocessing(preprocessing))
    if settings.token is None and not _is_loopback(listener.getsockname()[0]):
        say("warning", f"whoever reaches {host} may send requests; --token-file asks them for a token")
    address = f"[{host}]" if ":" in host else host
    url = f"http://{address}:{listener.getsockname()[1]}"
    try:
        serve(create_app(predictor, settings), listener, settings, lambda: out.print(
            f"Serving {predictor.arch} at {url} (Ctrl-C stops)", markup=False, soft_wrap=True))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _token(path: Path | None) -> str | None:
    try:
        return None if path is None else read_token(path)
    except ValueError as error:
        raise CommandError(str(error)) from None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
