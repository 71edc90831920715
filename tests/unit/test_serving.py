"""The server over HTTP: answers, batches, limits, and what it does not tell."""

import json
import math
import re
import socket
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
from PIL import Image

from skipnet_rt.data import digits_pictures

pytest.importorskip("fastapi", reason="needs the extra [serve]")
from served import BOUNDARY, FORM, Held, form, png, request, served, wait_until

from skipnet_rt.serving import Predictor, Settings, batching

pytestmark = pytest.mark.usefixtures("one_thread")

TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor()


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    """Digits as PNG files."""
    return [png(picture) for picture in digits_pictures(held_out=True)[0][:24]]


@pytest.fixture(scope="module")
def server(predictor):
    """One with small limits, that many tests share."""
    with served(predictor, Settings(max_body=100_000, max_pixels=10_000, max_images=4)) as one:
        yield one


@pytest.fixture
def held():
    """A predictor that the test holds up, and lets go at the latest when it ends."""
    one = Held()
    yield one
    one.free.set()


def essence(result: dict) -> dict:
    """All of a result that may not depend on the batch or on the clock."""
    return {name: value for name, value in result.items() if name not in ("milliseconds", "batch")}


# Answers -------------------------------------------------------------------------------------------------------------

def test_a_form_and_json_get_the_predictors_answers(server, predictor, files):
    expected = [essence(predictor.to_dict(prediction, 5)) for prediction in predictor.predict(files[:4])]
    encoded = [b64encode(file).decode() for file in files[:4]]
    for answer in (server.predict(*files[:4]), server.predict_json({"files": encoded})):
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/json"
        assert [essence(result) for result in answer.json["results"]] == expected
        for result in answer.json["results"]:
            assert result["milliseconds"] > 0
            assert result["route"][0] is True
            assert result["blocks_run"] == sum(result["route"])
            assert len(result["route"]) == result["blocks"] == 18
            assert result["computation"] == pytest.approx(100 * result["blocks_run"] / 18)
            assert (result["label"], result["probability"]) == (
                result["classes"][0]["label"], max(entry["probability"] for entry in result["classes"]))


def test_options_of_both_kinds_of_request(server, files):
    encoded = b64encode(files[0]).decode()
    for answer in (server.predict(files[0], top="1000", dense="true"),
                   server.predict_json({"files": [encoded], "top": 1000, "dense": True})):
        (result,) = answer.json["results"]
        assert len(result["classes"]) == 10
        assert sum(entry["probability"] for entry in result["classes"]) == pytest.approx(1)
        assert result["dense_milliseconds"] > 0
    (result,) = server.predict(files[0], top="1").json["results"]
    assert len(result["classes"]) == 1
    assert result["dense_milliseconds"] is None


@pytest.mark.parametrize("settings", [Settings(max_batch=8), Settings(max_batch=5, max_wait_ms=20),
                                      Settings(max_batch=1)])
def test_an_answer_is_bitwise_the_same_alone_and_in_any_batch(settings, held, files):
    with served(held, settings) as server:
        alone = [essence(server.predict(file).json["results"][0]) for file in files]
        assert set(held.sizes) == {1}
        held.free.clear()
        with ThreadPoolExecutor(len(files)) as clients:
            first = clients.submit(server.predict, files[0])  # it keeps the engine busy while the others gather
            wait_until(lambda: len(held.sizes) == 26)
            groups = [files[start:start + 3] for start in range(0, 24, 3)]
            answers = [clients.submit(server.predict, *group) for group in groups]
            wait_until(lambda: b"skipnet_requests_inside 9.0" in server.get("/metrics").body)
            held.free.set()
            together = [essence(result) for answer in answers for result in answer.result().json["results"]]
            assert [essence(result) for result in first.result().json["results"]] == alone[:1]
        assert together == alone, "to the last digit"
        assert max(held.sizes) == settings.max_batch, "there were batches"
        assert sum(held.sizes) == 1 + 24 + 1 + 24, "the first of all is the warm-up"


def test_answers_are_the_same_where_the_event_loop_computes(monkeypatch, predictor, files):
    """It does so with small pictures that come alone; larger ones, more and both ways stay with the threads."""
    monkeypatch.setattr(batching, "QUICK", math.inf)
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    heavy = png(Image.fromarray(noise))  # small enough, but its file is not
    large = png(Image.new("RGB", (400, 400), "white"))
    assert len(heavy) > 2**16 > len(large)
    with served(predictor) as server:
        for given in [[files[0]], [files[1]], [files[2]], [heavy], [large], files[:3], [files[0]]]:
            expected = [essence(predictor.to_dict(each, 5)) for each in predictor.predict(given)]
            assert [essence(result) for result in server.predict(*given).json["results"]] == expected
        timed = server.predict(files[0], dense="true").json["results"][0]
        assert timed["dense_milliseconds"] > 0
        assert server.predict(b"no picture").status == 422


def test_what_the_server_says_of_itself(server, predictor):
    model = server.get("/v1/model").json
    assert model == {**json.loads(json.dumps(predictor.describe())),
                     "limits": {"body": 100_000, "pixels": 10_000, "images": 4, "seconds": 30.0}}
    assert (server.get("/healthz").status, server.get("/readyz").status) == (200, 200)
    page = server.get("/")
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.headers["content-security-policy"].startswith("default-src 'none'; ")
    assert not re.search(rb"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page.body), "no external address"
    assert page.headers["x-content-type-options"] == "nosniff"


def test_openapi_describes_both_kinds_of_request(server):
    document = server.get("/openapi.json").json
    operation = document["paths"]["/v1/predict"]["post"]
    assert set(operation["requestBody"]["content"]) == {"multipart/form-data", "application/json"}
    assert {"200", "400", "401", "408", "413", "415", "422", "503", "504"} <= set(operation["responses"])
    assert set(document["paths"]) == {"/v1/predict", "/v1/model", "/healthz", "/readyz", "/metrics"}


def test_metrics_count_requests_batches_and_blocks(predictor, files):
    with served(predictor) as server:
        blocks = [result["blocks_run"] for result in server.predict(*files[:3]).json["results"]]
        server.predict(b"no picture")
        server.get("/nowhere/at/all")
        text = server.get("/metrics").body.decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values['skipnet_requests_total{path="/v1/predict",status="200"}'] == "1.0"
    assert values['skipnet_requests_total{path="/v1/predict",status="422"}'] == "1.0"
    assert values['skipnet_requests_total{path="other",status="404"}'] == "1.0"
    assert values["skipnet_request_seconds_count"] == "1.0"
    assert float(values["skipnet_executed_blocks_sum"]) == sum(blocks)
    assert float(values["skipnet_executed_blocks_count"]) == float(values["skipnet_batch_size_sum"]) == 3
    assert float(values["skipnet_engine_seconds_total"]) > 0
    assert values["skipnet_requests_inside"] == "0.0"


# What is not answered ------------------------------------------------------------------------------------------------

PICTURE = png(digits_pictures(held_out=True)[0][0])
BASE64 = b64encode(PICTURE).decode()
JSON = {"content_type": "application/json"}


@pytest.mark.parametrize(("body", "headers", "status", "why"), [
    (b"", {}, 415, "multipart/form-data"),
    (b"files=x", {"content_type": "application/x-www-form-urlencoded"}, 415, "multipart/form-data"),
    (b"", FORM, 400, "ends before its last boundary"),
    (form([PICTURE])[:-20], FORM, 400, "ends before its last boundary"),
    (form([PICTURE]), {"content_type": "multipart/form-data"}, 400, "not multipart/form-data as its header says"),
    (form([PICTURE]), {"content_type": "multipart/form-data; boundary=other"}, 400, "not multipart/form-data"),
    (b"--" + BOUNDARY.encode() + b"\r\nx\0: y\r\n", FORM, 400, "not multipart/form-data"),
    (form([]), FORM, 400, "at least one picture"),
    (form([], top="2"), FORM, 400, "at least one picture"),
    (form([PICTURE], top="none"), FORM, 400, "'top' must be"),
    (form([PICTURE], top="0"), FORM, 400, "'top' must be"),
    (form([PICTURE], top="-1"), FORM, 400, "'top' must be"),
    (form([PICTURE], top="9" * 5000), FORM, 400, "'top' must be"),
    (form([PICTURE], dense="maybe"), FORM, 400, "'dense' true or false"),
    (form([PICTURE], colour="red"), FORM, 400, "unknown field 'colour'"),
    (form([PICTURE] * 5), FORM, 413, "up to 4 pictures"),
    (form([b""] * 500), FORM, 413, "up to 4 pictures"),
    (json.dumps({"files": [""] * 5}).encode(), JSON, 413, "up to 4 pictures"),
    (form([PICTURE, b"no picture"]), FORM, 422, "files[1]: not a picture that can be read"),
    (form([PICTURE[:-25]]), FORM, 422, "files[0]: not a picture that can be read"),
    (form([png(digits_pictures(held_out=True)[0][0].resize((101, 100)))]), FORM, 413, "up to 10000 pixels"),
    (b"{", JSON, 400, "not JSON"),
    (b"\xff\xfe", JSON, 400, "not JSON"),
    (b"[" * 90_000, JSON, 400, "not JSON"),
    (b"[]", JSON, 400, "an object with 'files'"),
    (b"{}", JSON, 400, "an object with 'files'"),
    (b'{"files": "x"}', JSON, 400, "an object with 'files'"),
    (b'{"files": []}', JSON, 400, "at least one picture"),
    (b'{"files": [1]}', JSON, 400, "in base64"),
    (b'{"files": ["%%%"]}', JSON, 400, "in base64"),
    (b'{"files": ["\xc3\xa9"]}', JSON, 400, "in base64"),
    (json.dumps({"files": [BASE64], "top": 0}).encode(), JSON, 400, "'top' must be"),
    (json.dumps({"files": [BASE64], "top": True}).encode(), JSON, 400, "'top' must be"),
    (json.dumps({"files": [BASE64], "top": 1.5}).encode(), JSON, 400, "'top' must be"),
    (json.dumps({"files": [BASE64], "dense": "yes"}).encode(), JSON, 400, "'dense' true or false"),
    (json.dumps({"files": [BASE64], "colour": 1}).encode(), JSON, 400, "unknown key 'colour'"),
    (b"x" * 100_001, FORM, 413, "up to 100000 bytes"),
])
def test_what_is_wrong_gets_a_status_and_one_line(server, body, headers, status, why):
    answer = server.ask("POST", "/v1/predict", body, **headers)
    assert answer.status == status, answer.body
    assert list(answer.json) == ["detail"]
    assert why in answer.json["detail"]
    assert "\n" not in answer.json["detail"]


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/v1/predict", 405), ("POST", "/v1/predict/", 404), ("GET", "/docs", 404), ("GET", "/../etc/passwd", 404),
    ("DELETE", "/", 405)])
def test_other_paths_and_methods(server, method, path, status):
    assert server.ask(method, path).status == status


def chunked(size: int) -> bytes:
    """A request without Content-Length, of this many bytes in chunks."""
    chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    return (request(b"", content_length="", transfer_encoding="chunked") + chunk * (size // 4096) + b"0\r\n\r\n")


def answered(connection: socket.socket) -> bytes:
    """All that comes until the server closes, or stops sending for a while after its answer."""
    got = b""
    with connection:
        while True:
            data = connection.recv(65536)
            got += data
            if not data or b"\r\n\r\n{" in got:
                return got


def is_cut(connection: socket.socket, endless: bytes) -> bool:
    """Whether the server closes while this is sent again and again: 20 MB of it at the most."""
    try:
        for _ in range(20_000_000 // len(endless)):
            connection.sendall(endless)
    except OSError:
        return True
    return False


def test_a_body_in_chunks_is_limited_too(server, files):
    assert b" 413 " in answered(server.raw(chunked(150_000)))
    body = form(files[:2])
    parts = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:100], body[100:]))
    whole = request(b"", content_length="", transfer_encoding="chunked") + parts + b"0\r\n\r\n"
    assert b" 200 OK" in answered(server.raw(whole))


def test_a_connection_is_cut_that_sends_on_and_on(server):
    """What follows the answer is read, so that the client sees it; but not for ever."""
    with server.raw(request(b"", content_length="", transfer_encoding="chunked")) as connection:
        assert is_cut(connection, b"1000\r\n" + b"x" * 4096 + b"\r\n")


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nx: "])
def test_a_head_without_end_is_cut(server, start):
    with server.raw(start) as connection:
        assert is_cut(connection, b"x-header: " + b"y" * 1000 + b"\r\n")


def test_beyond_the_queue_requests_are_refused_and_none_is_lost(held, files):
    with served(held, Settings(max_queue=3)) as server, ThreadPoolExecutor(4) as clients:
        held.free.clear()
        taken = [clients.submit(server.predict, files[0]) for _ in range(3)]
        wait_until(lambda: server.get("/readyz").status == 503)
        for refused in (server.predict(files[0]), server.get("/readyz")):
            assert refused.status == 503
            assert refused.headers["retry-after"] == "1"
            assert "try again" in refused.json["detail"]
        assert server.get("/healthz").status == 200
        held.free.set()
        assert [answer.result().status for answer in taken] == [200] * 3
        wait_until(lambda: server.get("/readyz").status == 200)
        assert server.predict(files[0]).status == 200


def test_bodies_in_memory_are_limited_together(held, files):
    """A request keeps its body until its pictures are images: those that are still coming count."""
    with served(held, Settings(max_body=4_000)) as server, ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(server.raw(request(b"x" * 3_900)[:-1]))
        large = files[0] + b"x" * 3_000  # behind the end of a picture may be anything
        wait_until(lambda: server.predict(large).status == 503)
        stack.close()
        wait_until(lambda: server.predict(large).status == 200)


def test_a_request_has_limited_time(held, files):
    with served(held, Settings(timeout=0.3)) as server:
        late = server.raw(request(form([files[0]]))[:-1])
        held.free.clear()
        answer = server.predict(files[0])
        assert answer.status == 504
        assert "0.3 seconds" in answer.json["detail"]
        held.free.set()
        assert b" 408 " in answered(late)
        assert server.predict(files[0]).status == 200


def test_a_silent_connection_and_a_slow_head_are_closed(predictor):
    with (served(predictor, Settings(timeout=0.1)) as server,  # after a second more: what is answered is not cut
          server.raw() as silent, server.raw(b"POST /v1/pre") as slow):
        assert silent.recv(100) == slow.recv(100) == b""


def test_a_client_that_goes_away_costs_nothing(held, files):
    with served(held) as server, ThreadPoolExecutor(1) as clients:
        held.free.clear()
        stays = clients.submit(server.predict, files[0])
        wait_until(lambda: len(held.sizes) == 2)
        gone = [server.raw(request(form(files[1:5]))) for _ in range(5)]
        half = server.raw(request(form(files[1:5]))[:-100])
        wait_until(lambda: b"skipnet_requests_inside 7.0" in server.get("/metrics").body)
        for connection in (*gone, half):
            connection.close()
        wait_until(lambda: b"skipnet_requests_inside 1.0" in server.get("/metrics").body)
        held.free.set()
        assert stays.result().status == 200
        assert server.predict(files[0]).status == 200
        assert held.sizes == [1, 1, 1], "the warm-up and two that stayed"
        assert b'path="/v1/predict",status="499"} 6.0' in server.get("/metrics").body


def test_a_mistake_of_ours_is_not_told_and_does_not_end_the_server(held, files, tmp_path, capfd):
    with served(held) as server:
        held.error = RuntimeError(f"at {tmp_path}")
        answer = server.predict(files[0])
        assert answer.status == 500
        assert answer.json == {"detail": "a mistake of the server's; its log says more"}
        wait_until(lambda: str(tmp_path) in capfd.readouterr().err)  # said after the answer
        assert b'path="/v1/predict",status="500"} 1.0' in server.get("/metrics").body
        held.error = None
        assert server.predict(files[0]).status == 200


def test_a_token_is_asked_for(predictor, files):
    with served(predictor, Settings(token=TOKEN)) as server:
        right = {"authorization": f"Bearer {TOKEN}"}
        body = form(files[:1])
        assert server.ask("POST", "/v1/predict", body, **FORM, **right).status == 200
        for wrong in (None, "Bearer ", TOKEN, f"bearer {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}",
                      "Bearer \xe9"):
            given = {} if wrong is None else {"authorization": wrong}
            answer = server.ask("POST", "/v1/predict", body, **FORM, **given)
            assert answer.status == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert TOKEN not in answer.body.decode()
        for path in ("/v1/model", "/metrics", "/nowhere"):
            assert server.get(path).status == 401
        assert server.get("/v1/model", **right).status == server.get("/metrics", **right).status == 200
        for path in ("/", "/healthz", "/readyz", "/openapi.json"):
            assert server.get(path).status == 200
    assert TOKEN not in repr(Settings(token=TOKEN))


def test_another_computation_takes_the_batchers_place(predictor, files):
    """As Ray Serve's."""
    asked = []

    async def infer(prepare):
        images, dense = prepare(False)
        asked.append((len(images), dense))
        return predictor.infer(images, dense)

    with served(predictor, infer=infer) as server:
        assert server.predict(*files[:3]).status == server.predict(files[0], dense="true").status == 200
    assert asked == [(3, False), (1, True)]


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"max_queue": 0}, {"max_images": 0}, {"max_pixels": 0},
                                   {"max_body": 0}, {"max_wait_ms": -1}, {"max_wait_ms": float("inf")},
                                   {"timeout": 0}, {"timeout": float("nan")}, {"token": ""}])
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)
