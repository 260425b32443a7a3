"""Run the cells of a notebook in a process forked from one that has imported what notebooks need."""

import multiprocessing
import os
from pathlib import Path

# What the notebooks import, at their top or at the first training and the first plot, and what takes its time
PRELOADED = [
    "IPython.core.interactiveshell", "matplotlib.pyplot", "matplotlib_inline.backend_inline", "nbformat", "pandas",
    "PIL.Image", "pyro.infer", "pyro_mm.plots", "pyro_mm.recipes", "scipy.io", "sklearn.datasets",
    "sklearn.linear_model", "torch._dynamo", "torch.distributed.nn",
]  # fmt: skip


def code_cells(path: Path) -> list[str]:
    """Return the source of each code cell that has any, in order."""
    import nbformat

    cells = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code" and cell.source.strip()]


def run_cells(path: Path, folder: Path, outcome) -> None:
    """Run the code cells as a kernel does, and send each one's (error text, standard error) through a pipe.

    The value of a cell is formatted in all ways that a notebook would show it. The first error ends the run.
    """
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    class Shell(InteractiveShell):
        def enable_gui(self, gui=None):
            """Do nothing: there is no window, as in a kernel with `%matplotlib inline`."""

    os.environ["PYRO_MM_SMOKE"] = "1"  # whatever the server, which may be older, was started with
    os.chdir(folder)
    shell = Shell.instance(colors="nocolor")
    for source in code_cells(path):
        with capture_output() as captured:
            result = shell.run_cell(source)
            if result.success:
                shell.display_formatter.format(result.result)
        outcome.send(("" if result.success else captured.stdout, captured.stderr))
        if not result.success:
            break
    outcome.close()


def outcomes_of_cells(path: Path, folder: Path) -> list[tuple[str, str]]:
    """Run a notebook in a process of its own, and return (error text, standard error) of the cells that were run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # at the first call, which starts the server
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=run_cells, args=(path, folder, sending))
    process.start()
    sending.close()

    outcomes = []
    try:
        while True:
            outcomes.append(receiving.recv())
    except EOFError:
        process.join()
    return outcomes
