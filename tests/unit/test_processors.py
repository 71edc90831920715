"""The CPU quota of cgroups, of either version, as files in a folder; affinity."""

import os
import sys

import pytest

from skipnet_rt.util.processors import cpu_quota, processors


@pytest.fixture
def quota(tmp_path):
    """Of a process whose /proc/self/cgroup holds this, where these files are mounted."""
    def read(membership: str, files: dict[str, str]) -> int | None:
        own, mount = tmp_path / "cgroup", tmp_path / "mount"
        own.write_text(membership)
        for path, text in files.items():
            (mount / path).parent.mkdir(parents=True, exist_ok=True)
            (mount / path).write_text(text)
        return cpu_quota(own, mount)
    return read


@pytest.mark.parametrize(("files", "expected"), [
    ({"a/b/cpu.max": "400000 100000\n"}, 4),
    ({"a/b/cpu.max": "250000 100000\n"}, 2),
    ({"a/b/cpu.max": "50000 100000\n"}, 1),
    ({"a/b/cpu.max": "max 100000\n"}, None),
    ({"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
    ({"a/b/cpu.max": "max 100000\n", "cpu.max": "200000 50000\n"}, 4),
    ({}, None)])
def test_version_2(quota, files, expected):
    assert quota("0::/a/b\n", files) == expected


def test_version_2_in_a_container_that_sees_its_own_cgroup_only(quota):
    assert quota("0::/docker/0123abc\n", {"cpu.max": "200000 100000\n"}) == 2


@pytest.mark.parametrize(("quota_us", "expected"), [("300000", 3), ("-1", None)])
def test_version_1(quota, quota_us, expected):
    assert quota("5:memory:/a\n4:cpu,cpuacct:/a\n", {
        "cpu/a/cpu.cfs_quota_us": f"{quota_us}\n", "cpu/a/cpu.cfs_period_us": "100000\n"}) == expected


def test_without_cgroups(tmp_path):
    assert cpu_quota(tmp_path / "nothing", tmp_path) is None


def test_of_this_process():
    assert (cpu_quota() or 1) >= 1
    assert processors() >= 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")
def test_affinity_and_quota_bound_the_processors(monkeypatch):
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {max(allowed)})
        assert processors() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    monkeypatch.setattr(sys.modules[processors.__module__], "cpu_quota", lambda: 1)
    assert processors() == 1
