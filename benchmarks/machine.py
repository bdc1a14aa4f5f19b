"""What a figure was measured on: platform, processor, threads, versions. Every benchmark prints this line."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch


def machine(*packages: str, device: torch.device | None = None) -> str:
    """One line: platform, processor (or GPU) and torch's threads, Python, and the versions of these packages."""
    where = f"{processor()}, {torch.get_num_threads()} threads"
    if device is not None and device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{platform.platform()}, {where}, Python {platform.python_version()}, {versions}"


def publish(text: str, out: Path | None) -> None:
    """Print what was measured, and write it into the file that is kept."""
    print(text)
    if out:
        out.write_text(text + "\n", encoding="utf-8")


def processor() -> str:
    """The model's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
