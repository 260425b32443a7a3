"""Files in the format of MNIST."""

from __future__ import annotations

import gzip
import struct


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(payloads, folder, compress=False):
    folder.mkdir(exist_ok=True)
    for name, payload in payloads.items():
        path = folder / (f"{name}.gz" if compress else name)
        path.write_bytes(gzip.compress(payload) if compress else payload)
