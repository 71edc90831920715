"""A file is written whole or not at all, and nothing is left beside it."""

import pytest

from skipnet_rt.util.atomic import replacing


def test_what_was_written_takes_the_place_of_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with replacing(path) as temporary:
        temporary.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def fail_halfway():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_halfway()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_disk_is_the_caller_s(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(NotADirectoryError), replacing(tmp_path / "file" / "inside") as temporary:
        temporary.write_text("nowhere")
