"""``fabric run --devices 2 SCRIPT``, the launcher of Lightning Fabric, which starts processes by torchrun."""

import json
import os
import socket
import subprocess
import sys

import pytest

import pyro_mm as mm

LAUNCH = """
import sys
from argparse import Namespace
from lightning_fabric.cli import main
main(Namespace(
    script=sys.argv[1], accelerator="cpu", strategy=None, devices="2", num_nodes=1, node_rank=0,
    main_address="127.0.0.1", main_port=int(sys.argv[2]), precision=None,
))
"""  # what the command does with its arguments once click, which Fabric does not require, has read them

TRAIN = """
import json, os, torch, pyro_mm as mm
assert os.environ["LT_DEVICES"] == os.environ["WORLD_SIZE"] == "2"
torch.set_num_threads(1)
torch.manual_seed(int(os.environ["RANK"]))  # weights of their own, of which those of rank 0 count
rows = mm.Batch({"x": torch.linspace(0, 1, 120).reshape(40, 3), "y": torch.arange(40) % 3})
pair = mm.recipes.mvae(rows, latent=2, hidden=(4,))
history = mm.fit(*pair, rows, epochs=2, batch_size=10, seed=0, progress=False, device="cpu", checkpoint="run.pt")
weights = [p.double().sum().item() for p in pair.model.parameters()]
with open(f"rank-{os.environ['RANK']}.json", "w") as file:
    json.dump([history.columns["loss"], weights], file)
"""


@pytest.mark.skipif(not os.environ.get("PYRO_MM_LONG"), reason="starts four programs: PYRO_MM_LONG=1")
def test_processes_that_fabric_run_starts_train_together(tmp_path):
    pytest.importorskip("lightning_fabric", reason="lightning-fabric is not installed")
    (tmp_path / "train.py").write_text(TRAIN)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    root = os.path.dirname(os.path.dirname(mm.__file__))
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    subprocess.run(
        [sys.executable, "-c", LAUNCH, "train.py", str(port)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, check=True, timeout=300,
    )  # fmt: skip
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == second and len(first[0]) == 2
    assert (tmp_path / "run.pt").is_file()
