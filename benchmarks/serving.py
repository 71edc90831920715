"""The server under load: ours beside the same server around a dense engine; many requests; memory over time.

    pip install '.[serve]' onnx openvino
    python benchmarks/serving.py compare --output DIR                                  # the bundled network
    python benchmarks/serving.py compare --arch imagenet_rnn_gate_50 --output DIR
    python benchmarks/serving.py many --requests 100000 --output DIR
    python benchmarks/serving.py soak --seconds 600 --output DIR

Servers and clients are processes of their own on this machine, and share its cores. Every client sends its next
request when it has the answer to the one before. An answer counts only if it is the expected one, to the last digit.
``compare`` starts all servers first and measures them in turns.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from serving_clients import request
from torch import Tensor

import skipnet_rt as srt
from skipnet_rt.checkpoint.bundled import bundled_model
from skipnet_rt.data import digits_pictures
from skipnet_rt.measure.baselines import BASELINES
from skipnet_rt.measure.benchmark import random_network
from skipnet_rt.model.network import SkipNet
from skipnet_rt.model.routing import InferenceResult
from skipnet_rt.serving import Prediction, Predictor, Settings
from skipnet_rt.serving.app import create_app
from skipnet_rt.serving.server import listening, serve
from skipnet_rt.util import machine

CONCURRENCIES = (1, 8, 64)
PICTURES = 32  # different ones that the clients send


# What is served ------------------------------------------------------------------------------------------------------

def half_executing(architecture: str, pictures: Sequence[bytes], folder: Path) -> Path:
    """A checkpoint with random weights whose gates let about half of the gated blocks run, differing by picture."""
    torch.manual_seed(0)
    model, path = random_network(architecture), folder / "random.safetensors"
    bias = model.get_parameter("control.proj.bias")
    with torch.no_grad():
        model.get_parameter("control.proj.weight").mul_(30)
        low, high = -20.0, 20.0
        for _ in range(8):
            bias.fill_((low + high) / 2)
            srt.save(model, path)
            predictor = Predictor(path)
            share = np.mean([each.computation for each in predictor.predict(pictures[:8])])
            low, high = (low, bias.item()) if share > 0.5 else (bias.item(), high)
    return path


def pictures_for(architecture: str | None) -> list[bytes]:
    """Digits as PNG for the bundled network; else smooth random pictures of 320x240 as JPEG."""
    if architecture is None:
        return [_file(picture, "PNG") for picture in digits_pictures(held_out=True)[0][:PICTURES]]
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (PICTURES, 6, 8, 3), dtype=np.uint8)
    return [_file(Image.fromarray(each).resize((320, 240), Image.Resampling.BICUBIC), "JPEG") for each in coarse]


def _file(picture: Image.Image, kind: str) -> bytes:
    file = BytesIO()
    picture.save(file, kind)
    return file.getvalue()


class DensePredictor(Predictor):
    """The same pictures and answers, from a dense engine with every block executed.

    Args:
        path, threads: as for a predictor.
        baseline: the engine's name among the baselines of ``skipnet-rt benchmark``.
        max_batch: the largest batch; smaller ones are filled up to a power of two, for these engines want a size.
    """

    def __init__(self, path: Path | None, threads: int, baseline: str, max_batch: int) -> None:
        super().__init__(path, threads=threads)
        model: SkipNet = bundled_model() if path is None else srt.load(path)
        engine = next(each for each in BASELINES if each.name == baseline)
        shape = (3, *model.arch.image_size)
        self._sizes = [2**power for power in range(max_batch.bit_length())]
        self._calls = {size: engine.build(model, torch.zeros(size, *shape), torch.float32) for size in self._sizes}

    def infer(self, images: Sequence[Tensor], dense: bool = False) -> list[Prediction]:
        size = next(size for size in self._sizes if size >= len(images))
        batch = torch.stack([*images, *[images[-1]] * (size - len(images))])
        begun = time.perf_counter()
        logits = self._calls[size](batch)[:len(images)]
        milliseconds = 1e3 * (time.perf_counter() - begun)
        executed = torch.ones(len(images), self.arch.num_gates, dtype=torch.bool)
        return self._predictions(InferenceResult(logits, executed, executed.float(), self.arch), milliseconds)


def serve_dense(arguments: argparse.Namespace) -> None:
    """The server around a dense engine: what ``skipnet-rt serve`` is for ours."""
    settings, listener = Settings(max_batch=arguments.max_batch), listening("127.0.0.1", 0)
    predictor = DensePredictor(arguments.model, arguments.threads, arguments.baseline, arguments.max_batch)
    serve(create_app(predictor, settings), listener, settings,
          lambda: print(f"at http://127.0.0.1:{listener.getsockname()[1]} ", flush=True))


@dataclass(frozen=True)
class Server:
    """A server's process."""

    process: subprocess.Popen[str]
    port: int

    @property
    def cpu(self) -> float:
        """Seconds of processors' time that it has taken, the engine's included."""
        after_name = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def resident(self) -> float:
        """MiB of memory that it occupies."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024


@contextmanager
def started(command: Sequence[str]) -> Iterator[Server]:
    """A server from its first line to SIGTERM, after which it must end well."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield Server(process, int(line.split("http://127.0.0.1:")[1].split()[0]))
        process.terminate()
        assert process.wait(60) == 0, "the server did not end well"
    finally:
        process.kill()
        process.wait()


def ours(model: Path | None, threads: int, max_batch: int) -> list[str]:
    """The command of our server."""
    return ["-m", "skipnet_rt", "serve", "--port", "0", "--threads", str(threads), "--max-batch", str(max_batch),
            *(["--model", str(model)] if model else [])]


def theirs(model: Path | None, threads: int, max_batch: int, baseline: str) -> list[str]:
    """The command of the server around a dense engine."""
    return [__file__, "dense-server", "--baseline", baseline, "--threads", str(threads), "--max-batch", str(max_batch),
            *(["--model", str(model)] if model else [])]


# Measurements --------------------------------------------------------------------------------------------------------

def loaded(server: Server, pictures: Sequence[bytes], concurrency: int, seconds: float, requests: int = 10**9
           ) -> dict[str, Any]:
    """What clients in a process of their own see of a server."""
    orders = {"port": server.port, "concurrency": concurrency, "seconds": seconds, "requests": requests,
              "pictures": [b64encode(picture).decode() for picture in pictures]}
    before = server.cpu
    done = subprocess.run([sys.executable, Path(__file__).with_name("serving_clients.py")], input=json.dumps(orders),
                          stdout=subprocess.PIPE, text=True, check=True, timeout=seconds + 600)
    seen: dict[str, Any] = json.loads(done.stdout)
    return {**seen, "cpu_milliseconds": 1e3 * (server.cpu - before) / (seen["sent"] + len(pictures))}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ours and a dense engine, with dynamic batching and without, at each concurrency, in turns."""
    pictures, rows = pictures_for(arguments.arch), []
    with tempfile.TemporaryDirectory() as folder:
        path = half_executing(arguments.arch, pictures, Path(folder)) if arguments.arch else None
        commands = {(name, batch): ours(path, arguments.threads, batch) if name == "skipnet-rt" else
                    theirs(path, arguments.threads, batch, arguments.baseline)
                    for name in ("skipnet-rt", f"dense {arguments.baseline}") for batch in (1, arguments.max_batch)}
        predictor = Predictor(path, threads=arguments.threads)
        computation = float(np.mean([each.computation for each in predictor.predict(pictures)]))
        bare = []
        with _all_started(commands) as servers:
            for concurrency in CONCURRENCIES:
                rounds: dict[tuple[str, int], list[dict[str, Any]]] = {key: [] for key in servers}
                for _ in range(arguments.rounds):
                    for key, server in servers.items():
                        if concurrency == 1 and key == ("skipnet-rt", 1):
                            bare.append(_bare(predictor, pictures))
                        rounds[key].append(loaded(server, pictures, concurrency, arguments.seconds))
                for (name, batch), seen in rounds.items():
                    rows.append({"server": name, "max_batch": batch, **_joined(seen)})
                    print(json.dumps(rows[-1]), file=sys.stderr)
    alone = next(row for row in rows if row["server"] == "skipnet-rt" and row["concurrency"] == 1)
    return {"network": arguments.arch or "bundled", "computation": 100 * computation, "threads": arguments.threads,
            "rounds": arguments.rounds, "seconds": arguments.seconds, "servers": rows,
            "bare_runtime": {"p50": median(each["runtime"] for each in bare),
                             "with_decoding_p50": median(each["predictor"] for each in bare)},
            "overhead_p50": alone["p50"] - median(each["runtime"] for each in bare)}


@contextmanager
def _all_started(commands: dict[tuple[str, int], list[str]]) -> Iterator[dict[tuple[str, int], Server]]:
    with ExitStack() as stack:
        yield {key: stack.enter_context(started(command)) for key, command in commands.items()}


def _bare(predictor: Predictor, pictures: Sequence[bytes]) -> dict[str, float]:
    """Milliseconds of the runtime alone, and with decoding and preprocessing, for one picture; medians."""
    images = [predictor.image(picture).unsqueeze(0) for picture in pictures]
    times: dict[str, list[float]] = {"runtime": [], "predictor": []}
    end = time.perf_counter() + 2
    while time.perf_counter() < end:
        for image, picture in zip(images, pictures, strict=True):
            begun = time.perf_counter()
            predictor.runtime.infer(image)
            between = time.perf_counter()
            predictor.predict([picture])
            times["runtime"].append(1e3 * (between - begun))
            times["predictor"].append(1e3 * (time.perf_counter() - between))
    return {name: median(values) for name, values in times.items()}


def _joined(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rounds of one measurement as one: medians of the rounds, sums of the answers."""
    answers: Counter[str] = Counter()
    for each in rounds:
        answers.update(each["answers"])
    return {"concurrency": rounds[0]["concurrency"], "answers": dict(answers),
            **{name: median(each[name] for each in rounds)
               for name in ("requests_per_second", "p25", "p50", "p99", "cpu_milliseconds")}}


def many(arguments: argparse.Namespace) -> dict[str, Any]:
    """So many requests, of which none may be lost and none be answered in another way than the first of its kind."""
    with started(ours(None, arguments.threads, arguments.max_batch)) as server:
        seen = loaded(server, pictures_for(None), arguments.concurrency, arguments.seconds,
                      arguments.requests)
    return {"network": "bundled", "threads": arguments.threads, "max_batch": arguments.max_batch, **seen}


def soak(arguments: argparse.Namespace) -> dict[str, Any]:
    """A server's memory while all kinds of requests come for a long time; every ten seconds a while of them."""
    memory = []
    with started([*ours(None, arguments.threads, arguments.max_batch), "--max-body", "200000"]) as server:
        begun, statuses = time.perf_counter(), Counter[str]()
        while (since := time.perf_counter() - begun) < arguments.seconds:
            memory.append({"second": round(since), "resident_mib": round(server.resident, 2)})
            seen = loaded(server, pictures_for(None), arguments.concurrency, arguments.slice)
            statuses.update(seen["answers"])
            _mischief(server.port)
            time.sleep(max(0.0, 10 - (time.perf_counter() - begun - since)))
        memory.append({"second": round(since), "resident_mib": round(server.resident, 2)})
    return {"network": "bundled", "threads": arguments.threads, "concurrency": arguments.concurrency,
            "answers": dict(statuses), "memory": memory}


def _mischief(port: int) -> None:
    """What comes to a server besides: too much, nonsense, and clients that go away."""
    whole = request(pictures_for(None)[0])
    for data in (whole[:-40], b"POST /v1/predict HT", whole):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as opened:
                opened.sendall(data)
    for body, kind in ((b"x" * 200_001, "application/json"), (b"[" * 100_000, "application/json"), (b"?", "text/plain"),
                       (b'{"files": ["bm8gcGljdHVyZQ=="]}', "application/json")):
        for _ in range(20):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("POST", "/v1/predict", body, {"Content-Type": kind})
            status = connection.getresponse().status
            connection.close()
            assert 400 <= status < 500, status


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function, name in ((compare, "compare"), (many, "many"), (soak, "soak"),
                           (serve_dense, "dense-server")):
        command = commands.add_parser(name, description=function.__doc__)
        command.set_defaults(function=function, name=name)
        command.add_argument("--arch", help="a published network with random weights; the bundled one by default")
        command.add_argument("--threads", type=int, default=1, help="of the engine")
        command.add_argument("--max-batch", type=int, default=32, help="with dynamic batching")
        command.add_argument("--baseline", default="OpenVINO", help="the dense engine")
        command.add_argument("--rounds", type=int, default=3)
        command.add_argument("--seconds", type=float, default=3.0, help="of a measurement, at the most")
        command.add_argument("--requests", type=int, default=100_000, help="at the most")
        command.add_argument("--concurrency", type=int, default=64)
        command.add_argument("--model", type=Path, help="the checkpoint of dense-server")
        command.add_argument("--slice", type=float, default=2.0, help="seconds of load in each ten of a soak")
        command.add_argument("--output", type=Path, help="a folder for the results")
    arguments = parser.parse_args()
    if arguments.function is not serve_dense:  # which has its own way to end
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers end with it
    measured = arguments.function(arguments)
    if measured is None:
        return
    document = {"command": f"benchmarks/serving.py {' '.join(sys.argv[1:])}", "versions": machine.versions(),
                "cpu": machine.cpu(), "load": machine.load(), **measured}
    text = json.dumps(document, indent=2) + "\n"
    if arguments.output:
        kind = f"-{arguments.arch or 'bundled'}" if arguments.name == "compare" else ""
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / f"serving-{arguments.name}{kind}.json").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
