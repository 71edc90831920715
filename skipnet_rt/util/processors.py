"""How many processors this process may keep busy: what its affinity and its cgroups' quota allow."""

from __future__ import annotations

import os
from pathlib import Path

_MEMBERSHIP, _MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def processors() -> int:
    """Processors that this process may keep busy, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, cpu_quota() or allowed)


def cpu_quota(membership: Path = _MEMBERSHIP, mount: Path = _MOUNT) -> int | None:
    """Whole processors that the CPU quota is worth, at least 1; None where there is none.

    A process is held to the least quota of its cgroup and of all above it. Threads beyond it would not compute sooner:
    when the quota is used up, the system stops all of them, those that others wait for included.

    Args:
        membership: the list of this process's cgroups, ``/proc/self/cgroup``.
        mount: where the cgroups are; version 1 has its CPU controller in the folder ``cpu``.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = mount
        elif "cpu" in controllers.split(","):
            root = mount / "cpu"
        else:
            continue
        folder = root / path.lstrip("/")
        # In a container the path may be the host's, and not there: the mount itself is its cgroup then.
        quotas += [_quota(at) for at in (folder, *folder.parents) if at == root or root in at.parents]
    return min((max(1, int(quota)) for quota in quotas if quota is not None), default=None)


def _quota(cgroup: Path) -> float | None:
    """Processors of one cgroup, by version 2's file or version 1's."""
    try:
        quota, period = (cgroup / "cpu.max").read_text(encoding="utf-8").split()
    except OSError:
        try:
            quota = (cgroup / "cpu.cfs_quota_us").read_text(encoding="utf-8")
            period = (cgroup / "cpu.cfs_period_us").read_text(encoding="utf-8")
        except OSError:
            return None
    return None if quota == "max" or int(quota) < 0 else int(quota) / int(period)
