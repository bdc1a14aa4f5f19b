"""TensorBoard's files of a run, written anew when training has ended: the same bytes whenever the run is the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from extract.whole import replace_on_success

NAME = "events.out.tfevents.0"
"""TensorBoard takes a file for its own by this beginning; what writes while it trains adds time, host and process."""


def rewrite_events(logs: Path, rows: Mapping[int, Mapping[str, float]]) -> None:
    """Replace the event files in `logs` by one with the same curves and no date: its clock counts epochs.

    Args:
        rows: step -> curve -> value.
    """
    written = sorted(logs.glob("events.out.tfevents.*"))
    if not written:
        return
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    with replace_on_success(logs / NAME) as temporary, open(temporary, "wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=0, file_version="brain.Event:2").SerializeToString())
        for step, curves in rows.items():
            values = [Summary.Value(tag=name, simple_value=curves[name]) for name in sorted(curves) if name != "step"]
            writer.write(Event(wall_time=step, step=step, summary=Summary(value=values)).SerializeToString())
        writer.flush()
    for path in written:
        if path.name != NAME:
            path.unlink()
