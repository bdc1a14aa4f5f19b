"""One of our commands, in a process that kills itself (SIGKILL) before its n-th change of the disk below a folder.

Run by path in a process that `multiprocessing`'s fork server makes, with these globals given: `COMMAND` (module),
`ARGUMENTS`, `FOLDER`, `CHANGE` (from 1), `SAID` (the file that takes what the command prints).
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from dataclasses import replace
from typing import Any

import mil.report.page

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def changes(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether Python is about to change something below the folder."""
    if not (event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES)):
        return False
    path = arguments[0]
    return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(FOLDER)  # type: ignore[name-defined]  # noqa: F821


def main(command: str, arguments: list[str], change: int, said: str) -> None:
    left = [change]

    def kill(event: str, about: tuple[Any, ...]) -> None:
        if changes(event, about):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    with open(said, "w", encoding="utf-8", buffering=1) as file:
        sys.stdout = sys.stderr = file
        mil.report.page.FIGURES.clear()
        mil.report.page.SECTIONS.update({k: replace(v, figures=()) for k, v in mil.report.page.SECTIONS.items()})
        module = importlib.import_module(command)
        sys.addaudithook(kill)
        sys.exit(module.main(arguments))


main(COMMAND, ARGUMENTS, CHANGE, SAID)  # type: ignore[name-defined]  # noqa: F821
