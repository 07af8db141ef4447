"""Training on two processes, on the CPU with gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import TensorDataset
from tnm_pipeline.training.loop import FitConfig, SparseTraining, fit
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import Recipe
from tnm_pipeline.training.sources import Splits, digits
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
data = digits()
few = Splits(TensorDataset(*data.train[:256]), data.test)
sparsity = SparseTraining(Pattern(2, 4, transposable=True), Recipe("mine", refresh_every=3, decay=1e-3))
result = fit(model, few, FitConfig(epochs=3, batch_size=32), sparsity=sparsity)
rank = int(__import__("os").environ.get("RANK", 0))
facts = {
    "loss": result.history.loss[-1][1],
    "steps": result.history.loss[-1][0],
    "flips": result.history.flip_rate,
    "mask": result.masks["1"].int().tolist(),
    "violations": [(row.violations, row.violations_transposed) for row in result.layers if row.pattern],
}
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(facts))
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_with_the_same_global_batch(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    launchers = {
        "one": [sys.executable],
        "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for name, launcher in launchers.items():
        (tmp_path / name).mkdir()
        command = [*launcher, str(script), str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    one = json.loads((tmp_path / "one/0.json").read_text(encoding="utf-8"))
    ranks = [json.loads((tmp_path / f"two/{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    assert ranks[0]["mask"] == ranks[1]["mask"] == one["mask"]
    for rank in ranks:
        assert rank["steps"] == one["steps"] == 24
        assert rank["violations"] == [[0, 0]]
        assert rank["flips"] == one["flips"]
        assert rank["loss"] == pytest.approx(one["loss"], rel=1e-4)
