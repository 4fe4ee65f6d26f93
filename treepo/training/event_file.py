"""TensorBoard's file of a run, encoded here: TensorBoard's own writer has a thread that ends the run with it.

The format is TFRecord: each event is a protocol buffer between its length and checksums.
"""

import io
import math
import os
import socket
import time
from collections.abc import Mapping

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]  # generated
from tensorboard.compat.proto.summary_pb2 import (
    DATA_CLASS_SCALAR,  # pyright: ignore[reportAttributeAccessIssue]  # generated
    SummaryMetadata,  # pyright: ignore[reportAttributeAccessIssue]  # generated
)
from tensorboard.plugins.scalar.metadata import PLUGIN_NAME
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util import tensor_util

_SCALAR = SummaryMetadata(
    plugin_data=SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME),
    data_class=DATA_CLASS_SCALAR,
)


def event_file_name() -> str:
    """A name that TensorBoard recognizes, and sorts by time."""
    return f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"


def first_event() -> bytes:
    """What an event file begins with."""
    return _record(Event(wall_time=time.time(), file_version="brain.Event:2"))


def scalars_event(step: int, wall_time: float, values: Mapping[str, float | None]) -> bytes:
    """One step's numbers. None is shown as nan. wall_time: Unix seconds."""
    event = Event(wall_time=wall_time, step=step)
    for name, value in values.items():
        number = np.float32(math.nan if value is None else value)
        event.summary.value.add(tag=name, tensor=tensor_util.make_tensor_proto(number), metadata=_SCALAR)
    return _record(event)


def _record(event: Event) -> bytes:
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
