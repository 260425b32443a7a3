"""Import Pyro without the warning that its progress bars miss ipywidgets, which nothing here needs."""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="IProgress not found")
    import pyro  # noqa: F401
