"""Signs of damage: what FFmpeg reports, and what a file's own layout says where FFmpeg reads on without a word."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterable
from typing import IO

import numpy as np

BOXES = {b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"mfra", b"free", b"skip", b"wide", b"sidx", b"uuid", b"meta"}
# Errors that decoders report about what accompanies the pictures.
ASIDE = re.compile(r"\bSEI\b|\bAPP|E(xif|XIF)|\bICC\b|user data|timecode")


def reported(log: Iterable[tuple[int, str, str]], decoder: str) -> list[str]:
    """What FFmpeg's decoder of that name reports about the pictures, out of the log that PyAV captured."""
    return [text.strip() for _, name, text in log if name == decoder and not ASIDE.search(text)]


def cut_off(file: IO[bytes], form: str) -> str | None:
    """Why the end of a file must be missing, by the lengths that its outermost parts state; None if none says so."""
    file.seek(0, io.SEEK_END)
    size, at, ended = file.tell(), 8 * (form == "apng"), form != "apng"
    layout = "<4xI" if form == "avi" else ">I4x" if form == "apng" or "mov" in form else ""
    if form == "gif":
        file.seek(max(size - 1024, 0))
        tail = file.read()
        # Some end on the last block, without the trailer.
        whole = b"\0;" in tail or tail.endswith((b";", b"\0"))
        return None if whole else "it ends within a picture"
    while layout and at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        name = head[:4] if form == "avi" else head[4:8]
        length = struct.unpack(layout, head[:8])[0]
        if form == "avi":
            if name != b"RIFF" or length in (0, 2**32 - 1):  # written where one cannot go back to state it
                break
            length += 8
        elif form == "apng":
            length, ended = length + 12, ended or name == b"IEND"
        elif name not in BOXES or length == 0:  # the last one goes on to the end
            break
        elif length == 1 and len(head) == 16:
            length = struct.unpack(">Q", head[8:])[0]
        if at + length > size:
            return f"its part {name.decode('latin1')!r} announces {length} bytes and {size - at} are there"
        at += max(length, 8)
    return None if ended else "its last part, 'IEND', is missing"


def lost_packets(file: IO[bytes], program: int) -> tuple[str | None, int]:
    """(why packets of MPEG-TS must be missing, by their numbers, else None; how many segments were joined).

    FFmpeg sees these numbers too and does not tell all of it. A jump right at a key frame harms nothing that follows:
    so begins a segment that was joined to another.
    """
    file.seek(0)
    start = np.frombuffer(file.read(1 << 16), np.uint8)
    grids = [(step, at) for step in (188, 192, 204) for at in range(step) if (start[at::step][:4] == 0x47).all()]
    if not grids or len(start) < 4 * 204:
        return None, 0
    step, at = grids[0]
    last, joints = -1, 0
    while True:
        file.seek(at)
        block = np.frombuffer(file.read(step * 8192), np.uint8)
        if len(block) < step:
            within = 0 < len(block) < 188 and block[0] == 0x47
            return "it ends within a packet" if within else None, joints
        packets = block[: len(block) // step * step].reshape(-1, step)
        if (packets[:, 0] != 0x47).any():
            return f"no packet begins at byte {at + step * int(np.argmax(packets[:, 0] != 0x47))}", joints
        own = (packets[:, 1] & 31) * np.uint16(256) + packets[:, 2] == program
        where = np.flatnonzero(own & (packets[:, 3] & 16 > 0))  # those with content, which alone are counted
        rows = packets[where].astype(int)
        flags = np.where((rows[:, 3] & 32 > 0) & (rows[:, 4] > 0), rows[:, 5], 0)
        counts = np.append(last if last >= 0 or not len(rows) else (rows[0, 3] - 1) % 16, rows[:, 3] & 15)
        jumps = np.diff(counts) % 16 > 1  # the same number again is the same packet again
        joint = jumps & ((flags & 0x80 > 0) | (flags & 0x40 > 0) & (rows[:, 1] & 0x40 > 0))
        lost = jumps & ~joint | (rows[:, 1] & 0x80 > 0)
        if lost.any():
            return f"packets are missing before byte {at + step * int(where[np.argmax(lost)])}", joints
        joints += int(joint.sum())
        last = int(counts[-1])
        at += packets.size
