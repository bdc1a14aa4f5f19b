"""A word where a command ends without one: the system's memory is used up, or a library gives up inside itself.

SIGKILL leaves a process no time, and OpenBLAS, a bad_alloc in C++ or a panic in Rust end it from within, where no
Python runs. So a shell waits at the other end of a pipe, and speaks when that closes without a goodbye.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from extract.room import kills_of_group, left_by_limits

SCRIPT = """trap '' INT TERM HUP
read -r goodbye && exit
while read -r name count; do
    [ "$name" = oom_kill ] && [ "$count" -gt "$2" ] &&
        echo "The system ended a process of this control group because its memory was used up." >&2
done < "$3"
printf '%s\\n' "$1" >&2
"""
"""Its arguments: a sentence, how many processes of the control group the system had ended for their memory, and the
file that counts them."""


@contextmanager
def sudden_end_is_told() -> Iterator[None]:
    """Within, the end of this process by a signal or by a library is told on stderr. Only for a command of its own
    (`python -m mil.train`): there the process is the command's."""
    if not is_own_process():
        yield
        return
    try:
        shell = subprocess.Popen(["sh", "-c", SCRIPT, "sh", sentence(), *kills()], stdin=subprocess.PIPE)
    except OSError:  # no shell, or no process more: the command goes on without
        yield
        return
    try:
        yield
    finally:
        with suppress(BrokenPipeError):  # the shell itself was ended
            shell.communicate(b"goodbye\n")


def is_own_process() -> bool:
    """Whether this process was started as `python -m` with a command of the toolkit."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name.partition(".")[0] in ("mil", "extract")


def sentence() -> str:
    limits = ", ".join(f"{name} left {left / 1e6:,.0f} MB at the start" for name, left in left_by_limits().items())
    return (
        "Ended suddenly, by a signal or within a library: most often memory was used up"
        f"{f' ({limits})' if limits else ''}. No half file was left. Type the same command again (where the run folder "
        "exists, with resume=true) on a larger machine, with a higher limit, or for less at once."
    )


def kills() -> tuple[str, str]:
    """How many so far, and where that stands."""
    file = kills_of_group()
    return ("0", os.devnull) if file is None else (str(number_of_kills(file)), str(file))


def number_of_kills(file: Path) -> int:
    counted = [line.split()[1] for line in file.read_text().splitlines() if line.startswith("oom_kill ")]
    return int(counted[0]) if counted else 0
