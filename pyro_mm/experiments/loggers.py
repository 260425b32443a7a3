"""Loggers of the command line, of Lightning Fabric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..utils.global_state import preserve_process_settings
from .console import check_writable

LOGGERS = {"csv": "CSVLogger", "tensorboard": "TensorBoardLogger"}


def make_logger(kind: str, folder: Path) -> Any:
    """Return a logger that writes to a folder.

    Args:
        kind: one of :data:`LOGGERS`.
        folder: the folder, in which every training has one of its own.

    Raises:
        ValueError: it is not installed.
        OSError: the folder cannot be written to.
    """
    check_writable(folder)
    compile = torch.compile
    try:
        with preserve_process_settings():
            from lightning_fabric import loggers
        return getattr(loggers, LOGGERS[kind])(folder, name="")
    except ImportError as error:
        raise ValueError(f"--logger {kind} needs the extra loggers: pip install 'pyro-mm[loggers]'") from error
    finally:
        torch.compile = compile  # which the import replaces
