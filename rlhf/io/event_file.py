"""Event files of TensorBoard, written without its own writer, whose import takes a tenth of a second."""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from rlhf.io.files import clear_write_errors


class EventFile:
    """An event file to which steps are appended, each flushed immediately, so that a crash loses none."""

    def __init__(self, folder: Path, after_step: int | None = None) -> None:
        """Create the file.

        Args:
            folder: folder of the stage's event files, created if missing.
            after_step: last step before a resumed run. TensorBoard then forgets later steps of older files.

        Raises:
            UserError: the file cannot be written.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # here, because importing it takes a while

        self._event = Event
        self._waiting = [Event(wall_time=time.time(), file_version="brain.Event:2")]  # until there is more to write
        if after_step is not None:
            self._waiting.append(Event(step=after_step + 1, session_log=SessionLog(status=SessionLog.START)))
        self._path = folder / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        with clear_write_errors(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._stream = self._path.open("wb")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the scalars of a step, by name."""
        summary = {"value": [{"tag": name, "simple_value": value} for name, value in values.items()]}
        self._waiting.append(self._event(wall_time=time.time(), step=step, summary=summary))
        with clear_write_errors(self._path):
            while self._waiting:
                self._stream.write(record(self._waiting.pop(0).SerializeToString()))
            self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def record(data: bytes) -> bytes:
    """Return a record of a TFRecord file: the length of `data` and its checksum, then `data` and its checksum.

    Source: https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details

    Example:
        >>> record(b"").hex()
        '000000000000000029039807d8ea82a2'
    """
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    """Return the masked CRC-32C of `data`."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _crc_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ 0x82F63B78 * (byte & 1)  # Castagnoli's polynomial, bits reversed
    return byte


_CRC = [_crc_of_byte(byte) for byte in range(256)]
