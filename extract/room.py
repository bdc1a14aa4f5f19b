"""How much memory this process may still take: what the machine has free, `ulimit -v`, and the control group's limit.

Where a limit leaves too little, OpenBLAS waits a minute and then ends the process itself, with words of its own:
nothing can be caught, so it is looked at before. Sources: getrlimit(2); Linux, Documentation/admin-guide/cgroup-v2.rst
(memory.max, memory.current, memory.stat) and cgroup-v1/memory.rst.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from extract.config import ConfigError

WORKING_BYTES = 400 * 2**20
"""What libraries take besides tiles and members, by trial: buffers of OpenBLAS, stacks and arenas of threads."""
UNLIMITED = 2**60


def free_bytes() -> int:
    """At most what the machine has available, and what no limit forbids."""
    return max(0, min([psutil.virtual_memory().available, *left_by_limits().values()]))


def left_by_limits() -> dict[str, int]:
    """Bytes by the name of the limit that leaves them; only limits that are set."""
    return {**left_by_ulimit(), **left_by_groups()}


def left_by_ulimit() -> dict[str, int]:
    """Of the address space."""
    if sys.platform == "win32":
        return {}
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return {} if limit == resource.RLIM_INFINITY else {"ulimit -v": limit - psutil.Process().memory_info().vms}


def left_by_groups(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> dict[str, int]:
    """Of this process's control group and those around it, the smallest; file pages that can be dropped are free."""
    left = [bytes_left for folder in group_folders(root, groups) if (bytes_left := left_in(folder)) is not None]
    return {"the control group's memory limit": min(left)} if left else {}


def group_folders(root: Path, groups: Path) -> Iterator[Path]:
    """From the process's own group to the root; of version 2, and of version 1's controller of memory."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number != "0" and "memory" not in controllers.split(","):
            continue
        top = root if number == "0" else root / "memory"
        own = top / path.strip("/")
        yield from (folder for folder in (own, *own.parents) if folder == top or top in folder.parents)


def kills_of_group(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> Path | None:
    """The file in which the system counts the processes of this group that it ended for their memory."""
    names = ("memory.events", "memory.oom_control")
    files = (folder / name for folder in group_folders(root, groups) for name in names)
    return next((file for file in files if file.is_file()), None)


def left_in(group: Path) -> int | None:
    """None where the group has no limit, or says nothing."""
    for limit_name, used_name in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        limit, used = number_in(group / limit_name), number_in(group / used_name)
        if limit is not None and used is not None and limit < UNLIMITED:
            return limit - used + droppable(group / "memory.stat")
    return None


def number_in(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def droppable(stat: Path) -> int:
    """Pages of files that nobody used lately."""
    try:
        lines = dict(line.split(maxsplit=1) for line in stat.read_text().splitlines() if " " in line)
    except OSError:
        return 0
    return int(lines.get("inactive_file", lines.get("total_inactive_file", "0")))


def refuse_without_room(needed_bytes: int, what: str, advice: str) -> None:
    """Raise ConfigError where a limit leaves less than this and what libraries take.

    The machine's own memory is not looked at: it may be swapped, and others may give theirs back.
    """
    needed = needed_bytes + WORKING_BYTES
    problems = [
        f"{name} leaves {max(0, left) / 1e6:,.0f} MB, and {what} needs about {needed / 1e6:,.0f} MB; {advice}"
        for name, left in left_by_limits().items()
        if left < needed
    ]
    if problems:
        raise ConfigError("not enough memory", problems)
