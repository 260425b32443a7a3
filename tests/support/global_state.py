"""A picture of the process: everything of Python's, torch's, Pyro's, numpy's and matplotlib's that others could see."""

from __future__ import annotations

import gc
import inspect
import locale
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.poutine.runtime
import torch

# What libraries set for good, and go on needing: OpenMP's runtime in scikit-learn, inductor's files and its pointers.
RUNTIMES = ("KMP_", "TORCHINDUCTOR_", "_TORCHINDUCTOR_")
ENTRIES, IMPORTERS = len(sys.path), len(sys.meta_path)  # setuptools adds some for the packages that it brings along
WRAPPED = {"torch.manual_seed"}  # by torch itself, when its compiler is imported


def snapshot() -> dict[str, Any]:
    """Name of a setting -> a value that two snapshots can be compared by."""
    return _of_python() | _of_torch() | _of_pyro() | _of_numpy() | _of_matplotlib() | _patches()


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    """Name -> what is otherwise, as text, for what both snapshots have."""
    names = [name for name, value in before.items() if name in after and after[name] != value]
    return {name: _difference(before[name], after[name]) for name in names}


def _difference(before: Any, after: Any) -> str:
    if isinstance(before, dict) and isinstance(after, dict):
        changed = [k for k in {**before, **after} if before.get(k) != after.get(k)]
        return f"{ ({k: before.get(k) for k in changed}) } -> { ({k: after.get(k) for k in changed}) }"
    if isinstance(before, list) and isinstance(after, list):
        gone, new = [x for x in before if x not in after], [x for x in after if x not in before]
        return f"{gone} -> {new}" if gone or new else "another order, or another number of times"
    return f"{before!r} -> {after!r}"


def _of_python() -> dict[str, Any]:
    root = logging.getLogger()
    return {
        "warnings.filters": list(warnings.filters),
        "warnings.showwarning": warnings.showwarning,
        "environment": {k: v for k, v in os.environ.items() if not k.startswith(RUNTIMES)},
        "working directory": os.getcwd(),
        "locale": locale.setlocale(locale.LC_ALL),
        "sys.path": sys.path[:ENTRIES],
        "sys.meta_path": sys.meta_path[:IMPORTERS],
        "excepthooks": (sys.excepthook, threading.excepthook, sys.unraisablehook),
        "displayhook": sys.displayhook,
        "streams": (sys.stdout, sys.stderr, sys.stdin),
        "recursion limit": sys.getrecursionlimit(),
        "signals": [signal.getsignal(s) for s in sorted(signal.valid_signals())],
        "root logger": (root.level, list(root.handlers), list(root.filters), logging.root.manager.disable),
        "logging.raiseExceptions": logging.raiseExceptions,
        "gc": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
        "multiprocessing start method": multiprocessing.get_start_method(allow_none=True),
        "random": random.getstate(),
    }


def _of_torch() -> dict[str, Any]:
    backends = {
        f"torch.backends.{name}.{flag}": getattr(getattr(torch.backends, name), flag)
        for name, flags in {
            "cudnn": ("enabled", "benchmark", "deterministic", "allow_tf32", "benchmark_limit"),
            "mkldnn": ("enabled",),
            "opt_einsum": ("enabled", "strategy"),
        }.items()
        for flag in flags
        if hasattr(getattr(torch.backends, name, None), flag)
    }
    settings = {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        ),
        "warn always": torch.is_warn_always_enabled(),
        "float32 products": torch.get_float32_matmul_precision(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "reduced precision": (
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        ),
        "autocast": [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "flush denormal": bool(torch.tensor([1e-42]).mul(1.0).item()),
        "printing": vars(torch._tensor_str.PRINT_OPTS).copy(),
        "generator": torch.get_rng_state().tolist(),
        "sharing strategy": torch.multiprocessing.get_sharing_strategy(),
        "modes": torch._C._len_torch_function_stack(),
        "validate_args": torch.distributions.Distribution._validate_args,
        "hooks of all modules": [
            list(getattr(torch.nn.modules.module, name))
            for name in vars(torch.nn.modules.module)
            if name.startswith("_global_") and hasattr(getattr(torch.nn.modules.module, name), "keys")
        ],
    }
    for name in ("torch._dynamo.config", "torch._inductor.config", "torch._functorch.config"):
        if name in sys.modules:
            config = sys.modules[name]
            held = config.get_config_copy() if hasattr(config, "get_config_copy") else config.shallow_copy_dict()
            settings[name] = repr(sorted(held.items(), key=lambda item: item[0]))
    return backends | settings


def _of_pyro() -> dict[str, Any]:
    store = pyro.get_param_store()
    return {
        "pyro.settings": pyro.settings.get(),
        "parameter store": {name: id(value) for name, value in store.items()},
        "handlers": list(pyro.poutine.runtime._PYRO_STACK),
        "parameter stack": list(pyro.poutine.runtime._PYRO_PARAM_STORE.get_state()["params"]),
    }


def _of_numpy() -> dict[str, Any]:
    return {
        "numpy errors": (np.geterr(), np.geterrcall(), np.getbufsize()),
        "numpy printing": {k: v for k, v in np.get_printoptions().items() if k != "override_repr"},
        "numpy.random": repr(np.random.get_state(legacy=False)["state"]),
    }


def _of_matplotlib() -> dict[str, Any]:
    matplotlib, pyplot = sys.modules.get("matplotlib"), sys.modules.get("matplotlib.pyplot")
    if matplotlib is None or not hasattr(matplotlib, "rcParams"):
        return {}
    return {
        "rcParams": {k: repr(v) for k, v in dict.items(matplotlib.rcParams)},
        "interactive": matplotlib.is_interactive(),
        "figures": [] if pyplot is None else pyplot.get_fignums(),
    }


def _patches() -> dict[str, Any]:
    """The attributes of classes and modules that other people's code calls: one that was replaced shows."""
    found: dict[str, Any] = {}
    classes = [c for m in (torch.distributions, pyro.distributions) for c in vars(m).values() if inspect.isclass(c)]
    for owner in (torch.distributions.Distribution, torch.Tensor, torch.nn.Module, torch.optim.Optimizer, *classes):
        for name, value in vars(owner).items():
            if name not in ("__doc__", "__abstractmethods__", "_abc_impl", "__weakref__", "__dict__"):
                found[f"{owner.__module__}.{owner.__qualname__}.{name}"] = Same(value)
    for module in (
        torch,
        torch.nn.functional,
        torch.distributions,
        torch.autograd,
        np,
        pyro,
        pyro.distributions,
        warnings,
    ):
        for name, value in vars(module).items():
            if callable(value) and f"{module.__name__}.{name}" not in WRAPPED:
                found[f"{module.__name__}.{name}"] = Same(value)
    return found


class Same:
    """An object, equal to itself alone."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __repr__(self) -> str:
        return repr(self.value)[:100]
