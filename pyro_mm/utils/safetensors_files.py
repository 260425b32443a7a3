"""Files of the safetensors format, with a description in JSON and a check sum of everything in them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .atomic_files import replace_file
from .global_state import preserve_process_settings
from .tensor_files import OpenFile

DESCRIPTION = "pyro_mm"  # entries of the file's metadata, which are text
CHECKSUM = "crc32"


def save_safetensors(path: Path | OpenFile, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write tensors, and a description of them, to one file.

    Args:
        path: the file, which is replaced atomically; or an open binary file, which is written to.
        tensors: name -> tensor, of any device.
        description: what JSON can hold.

    Raises:
        TypeError: a tensor that the format cannot hold, or a description that JSON cannot. Nothing has been written.
        OSError: the file cannot be written; the message names its path.
    """
    with preserve_process_settings():
        from safetensors.torch import save

    flat = {name: _dense(name, tensor) for name, tensor in tensors.items()}
    try:
        text = json.dumps(description, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise TypeError(f"the description of the file is no JSON: {error}") from error
    metadata = {"format": "pt", DESCRIPTION: text, CHECKSUM: _checksum(text, flat)}
    try:
        content = save(flat, metadata)
    except Exception as error:
        kinds = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in flat.values()}))
        raise TypeError(f"a safetensors file cannot hold these tensors, of {kinds}: {error}") from error

    def write(file: BinaryIO) -> None:
        file.write(content)

    if isinstance(path, Path):
        replace_file(path, write)
    else:
        path.write(content)


def load_safetensors(path: Path | OpenFile, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of :func:`save_safetensors` onto the CPU.

    Args:
        path: the file; or an open binary file, which is read to its end.
        what: the kind of file that is expected, for the error message.

    Returns:
        (tensors by name, the description).

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is cut off, damaged or of another kind.
    """
    with preserve_process_settings():
        from safetensors.torch import load

    content = path.read_bytes() if isinstance(path, Path) else path.read()
    try:
        tensors = load(content)
        metadata = _metadata(content)
        text = metadata[DESCRIPTION]
        description = json.loads(text)
    except MemoryError:
        raise
    except Exception as error:  # several types, of two libraries
        raise ValueError(f"{path} is damaged, or not {what}: it cannot be read ({type(error).__name__})") from error
    if not isinstance(description, dict):
        raise ValueError(f"{path} is damaged, or not {what}: it does not say what it holds")
    if metadata.get(CHECKSUM) != _checksum(text, tensors):
        raise ValueError(f"{path} is damaged: its check sum is wrong")
    return tensors, description


def _metadata(content: bytes) -> dict[str, str]:
    """Return the metadata in the header of a file: its length in 8 bytes, then JSON."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"]  # type: ignore[no-any-return]


def _dense(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor with a memory of its own, which the format asks for: tied weights share one."""
    if is_lazy(tensor):
        raise TypeError(f"{name} has no shape yet: run its module once before it is saved")
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        kind = f"layout {tensor.layout} on {tensor.device}"
        raise TypeError(f"{name} is a tensor of {kind}, and not one of plain numbers")
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the CRC-32 of a description, and of the names, types, shapes and numbers of tensors."""
    total = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        if tensor.numel():
            total = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), total)
    return f"{total:08x}"
