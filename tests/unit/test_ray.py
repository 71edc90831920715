"""Ray: batch jobs and Ray Serve on a cluster of two cores, with processes killed in the middle of their work."""

import asyncio
import base64
import io
import json
import os
import signal
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import pytest
from PIL import Image

from skipnet_rt.cli import app as cli
from skipnet_rt.data import digits_pictures
from skipnet_rt.serving import Predictor

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra 'ray'")

import pyarrow  # noqa: E402

from skipnet_rt.serving import batch_job  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

PATIENCE = 120.0  # seconds


@pytest.fixture(scope="module", autouse=True)
def settings():
    """Of Ray's, for all its processes; and no cluster is left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        for side in ("REPLICA", "HANDLE"):  # a test cannot wait for ten seconds until the load is noticed
            patch.setenv(f"RAY_SERVE_{side}_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")
        yield
        ray.shutdown()


@pytest.fixture
def cluster():
    """Of this test session's own, whatever else runs on the machine."""
    if not ray.is_initialized():
        ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)


@pytest.fixture(scope="module")
def predictor():
    return Predictor(threads=1)


def workers(name: str) -> set[int]:
    """Processes of our cluster's that call themselves so."""
    found, parents = set(), {}
    for process in filter(str.isdecimal, os.listdir("/proc")):
        try:
            parents[int(process)] = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
            if Path(f"/proc/{process}/cmdline").read_bytes().startswith(name.encode()):
                found.add(int(process))
        except FileNotFoundError:  # it has just ended
            pass
    return {process for process in found if parents.get(parents[process]) == os.getpid()}  # test, raylet, worker


def until(condition, what: str, every: float = .2) -> None:
    """Waits for a condition, asked so often (in seconds)."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(every)


# Batch jobs -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Digits as files, two of them no good."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, digit in enumerate(digits_pictures(held_out=True)[0][:240]):
        (folder / f"{number // 100}").mkdir(exist_ok=True)
        digit.save(folder / f"{number // 100}" / f"{number:03}.png")
    (folder / "0" / "017.png").write_bytes(b"not at all")
    (folder / "1" / "120.png").write_bytes((folder / "1" / "121.png").read_bytes()[:50])
    return folder


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


def row_of(predictor: Predictor, name: str, data: bytes) -> dict:
    """What the job's results must say of a picture, to the bit."""
    (prediction,) = predictor.predict([data])
    answer = predictor.to_dict(prediction, 1)
    return {"image": name, "class": answer["class"], "label": answer["label"], "probability": answer["probability"],
            "probabilities": list(prediction.probabilities), "route": answer["route"],
            "blocks_run": answer["blocks_run"], "computation": answer["computation"], "error": None}


@pytest.fixture
def worker(tmp_path):
    """What an actor does with a part, without Ray."""
    def work(part: batch_job.Part, output: Path) -> None:
        output.mkdir(exist_ok=True)
        batch_job._Worker({"path": None, "threads": 1}, output)({"part": json.dumps(batch_job.asdict(part))})
    return work


def test_a_job_goes_on_where_it_stopped_loses_an_actor_and_writes_every_row_once(
        cluster, pictures, predictor, worker, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(batch_job, "PART", 4)
    output = tmp_path / "digits.parquet"
    parts = batch_job.divided([pictures], output)
    batch_job._begin(output, parts, None, None)
    for part in parts[5:8]:  # all that an interrupted run leaves: some parts, in any order, and perhaps half of one
        worker(part, output)
    (output / ".0123456789abcdef.tmp").write_bytes(b"half of a p")
    kept = {file: file.stat().st_mtime_ns for file in output.glob("part-*")}
    killed = []

    def kill() -> None:
        until(lambda: len(list(output.glob("part-*"))) > 3, "a part of this run", every=.002)
        os.kill(min(workers("ray::MapWorker")), signal.SIGKILL)
        killed.append(len(list(output.glob("part-*"))))

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["predict", "--ray", str(pictures), "--output", str(output), "--cpus", "1", "--json"])
    killer.join()
    said = capsys.readouterr()
    assert not stopped.value.code, said.err
    summary = json.loads(said.out)
    assert (summary["parts"], summary["parts_before"], summary["actors"]) == (60, 3, 2)
    assert (summary["pictures"], summary["errors"]) == (228, 2)
    assert 3 < killed[0] < 60, "in the middle"
    assert {file: file.stat().st_mtime_ns for file in kept} == kept, "what was done was not done again"
    rows = parquet.read_table(output).to_pylist()
    files = sorted(file for file in pictures.rglob("*") if file.is_file())
    assert [row["image"] for row in rows] == [str(file) for file in files], "each once, in order"
    bad = [row for row in rows if row["error"] is not None]
    assert [Path(row["image"]).name for row in bad] == ["017.png", "120.png"]
    assert all("not a picture" in row["error"] and row["class"] is None for row in bad)
    good = [row for row in rows if row["error"] is None]
    assert good == [row_of(predictor, row["image"], Path(row["image"]).read_bytes()) for row in good]
    assert list(output.glob(".*")) == []


@pytest.mark.parametrize("nested", [False, True], ids=["binary", "huggingface"])
def test_parquet_in_and_json_lines_out(predictor, worker, tmp_path, nested):
    files = [png(picture) for picture in digits_pictures(held_out=True)[0][:5]]
    files[3:3] = [None, b"nothing"]
    column = [{"bytes": file, "path": None} for file in files] if nested else files
    source = tmp_path / "digits.parquet"
    parquet.write_table(pyarrow.table({"image": column, "split": ["test"] * 7}), source, row_group_size=5)
    first, second = batch_job.divided([source], tmp_path / "out.jsonl")
    assert (second.number, second.row_group) == (1, 1)
    output = tmp_path / "out.jsonl"
    worker(first, output)
    worker(second, output)
    rows = [json.loads(line) for line in (output / "part-00001.jsonl").read_text().splitlines()]
    assert rows == [row_of(predictor, f"{source}#{number}", files[number]) for number in (5, 6)]
    errors = [json.loads(line)["error"] for line in (output / "part-00000.jsonl").read_text().splitlines()]
    assert errors[:3] == [None] * 3
    assert errors[3] == "no picture"
    assert "not a picture" in errors[4]


def test_a_picture_that_is_gone_is_an_error_of_its_row(worker, tmp_path):
    worker(batch_job.Part(0, [str(tmp_path / "gone.png")]), tmp_path / "out.parquet")
    (row,) = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert row["error"] == "No such file or directory"


@pytest.mark.parametrize(("sources", "output", "why"), [
    (["nowhere"], "out.parquet", "nowhere: there is no such file"),
    (["empty"], "out.parquet", "there is nothing to predict"),
    (["."], "out.csv", "out.csv: results are written to NAME.parquet or NAME.jsonl"),
    (["."], "out.parquet", "the results would lie among the pictures"),
    (["table.parquet"], "out.parquet", "needs a column 'image' of bytes, this one has image (string)"),
    (["broken.parquet"], "out.parquet", "broken.parquet: not a Parquet file that can be read"),
    (["one.png"], "other.parquet", "results of another job, with other pictures; choose another output"),
    (["one.png"], "taken.parquet", "the folder holds other files"),
])
def test_what_cannot_be_done_is_said_before_ray_starts(tmp_path, monkeypatch, sources, output, why):
    monkeypatch.setattr(batch_job, "_ray", lambda: pytest.fail("Ray was started"))
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "other.parquet", "taken.parquet"):
        Path(folder).mkdir()
    Path("one.png").touch()
    Path("taken.parquet", "mine.txt").touch()
    Path("broken.parquet").write_bytes(b"PAR1")
    parquet.write_table(pyarrow.table({"image": ["a.png"]}), "table.parquet")
    batch_job._begin(Path("other.parquet"), batch_job.divided([Path("taken.parquet")], Path("x.parquet")), None, None)
    with pytest.raises(batch_job.JobError) as raised:
        batch_job.run_job([Path(source) for source in sources], Path(output))
    assert why in str(raised.value)


# Ray Serve ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def address(cluster, tmp_path):
    """Ray Serve as the shipped file asks for it, on a port of its own."""
    pytest.importorskip("ray.serve", reason="needs the extra 'ray'")
    from click.testing import CliRunner
    from ray.serve.scripts import cli as serve_command
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shipped = (resources.files("skipnet_rt.serving") / "ray.yaml").read_text()
    assert "port: 8000" in shipped
    file = tmp_path / "ray.yaml"
    file.write_text(shipped.replace("port: 8000", f"port: {port}"))
    ran = CliRunner().invoke(serve_command, ["run", "--non-blocking", str(file)])
    assert ran.exit_code == 0, ran.output
    yield f"http://127.0.0.1:{port}"
    ray.shutdown()  # much faster than serve.shutdown


def ask(address: str, data: bytes) -> tuple[int, dict]:
    """Status and answer of a request with one picture in it."""
    body = json.dumps({"files": [base64.b64encode(data).decode()], "top": 10}).encode()
    request = urllib.request.Request(f"{address}/v1/predict", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, {}


def test_replicas_answer_like_the_runtime_grow_with_the_load_and_may_be_killed(address, predictor):
    """All in one go: a cluster takes longer to start than to be asked."""
    from ray import serve
    status = lambda: serve.status().applications["skipnet-rt"].deployments.get("SkipNet")  # noqa: E731
    until(lambda: status() and status().replica_states.get("RUNNING") == 1, "a replica")
    with urllib.request.urlopen(f"{address}/", timeout=PATIENCE) as page:
        assert b"skipnet-rt" in page.read()
    digits = [png(digit) for digit in digits_pictures(held_out=True)[0][:48]]
    expected = [predictor.to_dict(prediction) for prediction in predictor.predict(digits)]

    finished = threading.Event()
    statuses: list[int] = []

    def client(own: int) -> None:
        number = own
        while not finished.is_set():
            code, answer = ask(address, digits[number % len(digits)])
            statuses.append(code)
            if code == 200:
                (result,) = answer["results"]
                assert same(result, expected[number % len(digits)])
            number += 1

    with ThreadPoolExecutor(24) as clients:
        asking = [clients.submit(client, own) for own in range(24)]
        try:
            until(lambda: status().replica_states.get("RUNNING") == 2, "a second replica, for the load")
            loaded = len(statuses)
            until(lambda: len(statuses) > loaded + 100, "answers of both")
            assert set(statuses) == {200}
            os.kill(min(workers("ray::ServeReplica:skipnet-rt:SkipNet")), signal.SIGKILL)
            killed = len(statuses)
            until(lambda: len(statuses) > killed + 200, "answers after one was killed")
        finally:
            finished.set()
    for each in asking:
        each.result()  # every request had an answer, or a status that says why not
    assert set(statuses) <= {200, 500, 503}
    assert statuses[killed:].count(200) > 100


def same(result: dict, expected: dict) -> bool:
    """Bit for bit, but for what the batch and the clock make of it."""
    varying = ("milliseconds", "batch", "dense_milliseconds")
    return all(result[name] == value for name, value in expected.items() if name not in varying)


def test_arguments_of_the_application_are_checked(tmp_path):
    serve_app = pytest.importorskip("skipnet_rt.serving.ray", reason="needs the extra 'ray'")
    deployment = serve_app.app({"max_batch": "8", "max_queue": "50"})._bound_deployment
    assert deployment.max_ongoing_requests == 16, "twice a batch, or batches never fill"
    assert deployment.max_queued_requests == 50
    for arguments, why in (({"max_bach": 8}, "unknown argument 'max_bach'; known: model, token_file, max_batch"),
                           ({"token": "secret"}, "unknown argument 'token'"), ({"max_batch": "many"}, "valid integer"),
                           ({"max_batch": 0}, "max_batch must be at least 1")):
        with pytest.raises(ValueError, match=why):
            serve_app.app(arguments)


def test_batches_of_both_kinds_keep_their_order(predictor):
    serve_app = pytest.importorskip("skipnet_rt.serving.ray", reason="needs the extra 'ray'")
    images = [predictor.image(digit) for digit in digits_pictures(held_out=True)[0][:5]]
    kinds = [False, True, False, True, False]
    calls = []
    predictions = asyncio.run(serve_app.computed(list(zip(images, kinds, strict=True)), predictor, calls.append))
    assert [len(call) for call in calls] == [3, 1, 1]
    assert [prediction.dense_milliseconds is not None for prediction in predictions] == kinds
    assert [prediction.route for prediction in predictions] == [each.route for each in predictor.infer(images)]


def test_the_shipped_configuration_lets_batches_fill():
    yaml = pytest.importorskip("yaml", reason="needs the extra 'ray'")
    (application,) = yaml.safe_load((resources.files("skipnet_rt.serving") / "ray.yaml").read_text())["applications"]
    (deployment,) = application["deployments"]
    assert deployment["max_ongoing_requests"] >= 2 * application["args"]["max_batch"]
