"""A limit of memory that is met at any moment: every command ends with a message, and leaves no half file.

    python benchmarks/limits.py [--rooms=50,75,100,150,200,250,300,350] [--only=passes,extract] [--seconds=200]

The commands of `kills.py`, each once with `ulimit -v` set to what its process uses after all imports, and so many MB
more; `extract.room`, which looks before a study begins and would refuse most of them, is told that libraries take
nothing. Then the same command without a limit, as the message says, which must end with the folder of a run that was
never limited.

Printed for each: done, told by the command (exit code 2, or 1 for a slide that failed), told after a sudden end
(`extract.sudden`), or a traceback or silence; no end within so many seconds; half files; whether the next command's
folder is equal.
Exit code 1 if anything was silent, a traceback, endless, half, or unlike.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import kills
import psutil

import extract.room

MB = 2**20
ENDLESS = -9
"""What `kills.wait` does after its time."""
SAID = ("there is not enough memory", "allows no further process or thread", "not enough memory (")
SHELL_SECONDS = 2.0
"""For the shell to speak after the process has ended."""


def limited(command: kills.Command, room: int) -> kills.Command:
    """The same under a limit, as a process of its own."""

    def main(arguments: list[str]) -> int:
        # as `python -m mil.train` has it, by which `extract.sudden` tells a command's own process; no loader is needed
        sys.modules["__main__"].__spec__ = SimpleNamespace(name="mil.train")  # type: ignore[assignment]
        extract.room.WORKING_BYTES = 0
        left = psutil.Process().memory_info().vms + room * MB
        resource.setrlimit(resource.RLIMIT_AS, (left, left))
        return command.main(arguments)

    return kills.replace(command, main=main)


def outcome(code: int | None, said: str) -> str:
    if code == 0:
        return "done"
    if code == ENDLESS:
        return "no end"
    if "Ended suddenly" in said:
        return "told after a sudden end"
    if code in (1, 2) and any(words in said for words in SAID) and "Traceback" not in said:
        return "told"
    return f"traceback or silent ({code})"


def trial(command: kills.Command, expected: kills.TREE, room: int, seconds: float) -> tuple[str, int, bool]:
    """What became of it, half files, and whether the same command then ends with the same folder."""
    log = command.folder / "log"
    code = kills.wait(kills.start(limited(command, room), [], log), seconds)
    time.sleep(SHELL_SECONDS if code else 0)
    said = log.read_text()
    print(f"{command.name}, {room} MB: exit code {code}\n{said}\n", file=sys.stderr)
    half = len(kills.half_files(command.out))
    for _ in range(kills.MOST_TRIES):
        if kills.wait(kills.start(command, kills.advice(log), log)) == 0:
            break
    equal = kills.tree_of(command.out) == expected
    kills.clear(command)
    return outcome(code, said), half, equal


def main() -> int:
    arguments = kills.begin("limits.py", "torch", "lightning", "numpy")
    rooms = [int(room) for room in arguments.get("rooms", "50,75,100,150,200,250,300,350").split(",")]
    only = arguments.get("only", "passes,nested,predict,extract,finetune").split(",")
    print("| command | MB left | outcome | half files | then equal |\n" + "| --- " * 5 + "|")
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for name in only:
            command = kills.COMMANDS[name](Path(folder))
            command.folder.mkdir(exist_ok=True)
            expected = kills.uninterrupted(command).tree
            for room in rooms:
                became, half, equal = trial(command, expected, room, float(arguments.get("seconds", 200)))
                print(f"| {command.name} | {room} | {became} | {half} | {'yes' if equal else 'no'} |", flush=True)
                good &= not half and equal and not became.startswith(("traceback", "no end"))
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
