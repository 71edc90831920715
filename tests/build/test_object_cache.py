"""The cache of compiled files: an entry is found again only by the same command and the same sources."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import object_cache
import pytest
from object_cache import CompileError, compiled

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture
def project(tmp_path):
    """A source that includes a header, and a function that compiles it into a cache of its own."""
    (tmp_path / "headers").mkdir()
    (tmp_path / "headers" / "answer.h").write_text("inline int answer() { return 42; }\n")
    (tmp_path / "main.cpp").write_text('#include "answer.h"\nint main() { return answer(); }\n')

    def build(*flags):
        source, headers = tmp_path / "main.cpp", tmp_path / "headers"
        return compiled(["g++", "-c", *flags, "-I", headers, source], [source, headers], tmp_path / "cache")

    return tmp_path, build


def test_the_same_sources_are_compiled_once(project):
    _, build = project
    first = build()
    written = first.stat().st_ino
    assert build() == first
    assert first.stat().st_ino == written
    assert build("-O1") != first


@pytest.mark.parametrize("changed", ["main.cpp", "headers/answer.h"])
def test_a_change_of_any_source_compiles_again(project, changed):
    folder, build = project
    before = build()
    with (folder / changed).open("a") as file:
        file.write("// changed\n")
    assert build() != before


def test_what_does_not_compile_leaves_nothing(project):
    folder, build = project
    good = (folder / "main.cpp").read_text()
    (folder / "main.cpp").write_text("int main() { return nothing; }\n")
    for _ in range(2):
        with pytest.raises(CompileError, match="nothing"):
            build()
    (folder / "main.cpp").write_text(good)
    assert build().stat().st_size > 0


def test_who_comes_at_the_same_time_waits(project, monkeypatch):
    _, build = project
    runs, run = [], object_cache.subprocess.run

    def counted(words, **options):
        runs.append(words)
        return run(words, **options)

    monkeypatch.setattr(object_cache.subprocess, "run", counted)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: build(), range(4)))) == 1
    assert sum("-c" in words for words in runs) == 1


def test_entries_that_nobody_uses_are_removed(project):
    _, build = project
    old = build()
    os.utime(old, (0, 0))
    build("-O1")
    assert not old.exists()
    assert build() == old
