"""``skipnet-rt serve``: what it is told, what it says, and how it ends."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi", reason="needs the extra [serve]")
from served import Served, png, wait_until

from skipnet_rt.cli import app as cli
from skipnet_rt.data import digits_pictures
from skipnet_rt.serving import server

PICTURE = png(digits_pictures(held_out=True)[0][0])

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(capsys):
    """Runs ``skipnet-rt serve`` in this process; returns the exit status and both outputs."""
    def command(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["serve", *map(str, arguments)])
        return stopped.value.code or 0, *capsys.readouterr()
    return command


@pytest.fixture
def started(tmp_path):
    """Starts it in a process of its own, on a free port."""
    processes = []

    def start(*arguments):
        process = subprocess.Popen([sys.executable, "-m", "skipnet_rt", "serve", "--port", "0", *arguments], text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        processes.append(process)
        line = process.stdout.readline()
        assert line.startswith("Serving cifar10_rnn_gate_38 at http://127.0.0.1:"), process.stderr.read()
        assert line.endswith(" (Ctrl-C stops)\n")
        return process, Served(int(line.split(":")[2].split()[0]))

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_sigterm_answers_what_was_taken_and_ends(started):
    process, server = started("--max-wait-ms", "1500")  # so long do requests wait inside
    with ThreadPoolExecutor(6) as clients:
        answers = [clients.submit(server.predict, PICTURE) for _ in range(6)]
        wait_until(lambda: b"skipnet_requests_inside 6.0" in server.get("/metrics").body)
        process.send_signal(signal.SIGTERM)
        assert [answer.result().status for answer in answers] == [200] * 6
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.slow
def test_ctrl_c_ends_it_with_130(started):
    process, server = started("--max-batch", "1")
    assert server.predict(PICTURE).status == 200
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")


def test_mistakes_get_one_line(run, tmp_path, monkeypatch):
    empty, long = tmp_path / "empty", tmp_path / "long"
    empty.write_text(" \n")
    long.write_text("two words\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for arguments, why in (
                (["--token-file", tmp_path / "none"], "No such file or directory"),
                (["--token-file", empty], "a token is one line of printable ASCII without spaces"),
                (["--token-file", long], "a token is one line of printable ASCII without spaces"),
                (["--port", taken.getsockname()[1]], "cannot listen on 127.0.0.1, port"),
                (["--host", "192.0.2.1", "--port", 0], "cannot listen on 192.0.2.1, port 0"),
                (["--port", 0, "--model", tmp_path / "none.pth"], "No such file or directory"),
                (["--port", 0, "--engine", "tpu"], "no engine is called 'tpu'"),
                (["--port", 0, "--preprocessing", "imagenet"], "makes images of 3x224x224")):
            status, out, err = run(*arguments)
            assert (status, out) == (1, "")
            assert why in err
            assert err.startswith("error: ")
            assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--max-batch", "0"], ["--max-queue", "0"], ["--timeout", "0"],
                                       ["--max-wait-ms", "-1"], ["--port", "65536"], ["extra"]])
def test_a_wrong_command_line(run, arguments):
    assert run(*arguments)[0] == 2


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "python_multipart", "prometheus_client", "httptools"])
def test_without_the_extra_it_is_named(run, monkeypatch, missing):
    for name in list(sys.modules):
        if name.startswith((missing, "uvicorn.protocols", "skipnet_rt.serving.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)  # as if it were not installed
    status, _, err = run("--host", "192.0.2.1")  # not of this machine: nothing would be served
    assert status == 1
    assert err == f"error: the server needs {missing}; install it with: pip install 'skipnet-rt[serve]'\n"


def test_what_is_set_reaches_the_server(run, monkeypatch, tmp_path):
    (tmp_path / "token").write_text("secret\n")
    seen = {}

    def instead(app, listener, settings, on_start):
        seen.update(settings=settings, address=listener.getsockname(), title=app.title)
        listener.close()
        on_start()

    monkeypatch.setattr(server, "serve", instead)
    status, out, err = run("--port", 0, "--host", "0.0.0.0", "--max-batch", 3, "--max-wait-ms", 2.5, "--max-queue", 4,
                           "--max-body", 5, "--max-pixels", 6, "--max-images", 7, "--timeout", 8, "--threads", 1)
    assert status == 0
    assert "Serving cifar10_rnn_gate_38 at http://0.0.0.0:" in out
    assert err == "warning: whoever reaches 0.0.0.0 may send requests; --token-file asks them for a token\n"
    assert vars(seen["settings"]) == {"max_batch": 3, "max_wait_ms": 2.5, "max_queue": 4, "max_body": 5,
                                      "max_pixels": 6, "max_images": 7, "timeout": 8.0, "token": None}
    assert seen["address"][0] == "0.0.0.0"
    status, out, err = run("--port", 0, "--token-file", tmp_path / "token")
    assert (status, err) == (0, "")
    assert seen["settings"].token == "secret"
    assert seen["address"][0] == "127.0.0.1", "this machine alone, unless told otherwise"
    assert "secret" not in out
