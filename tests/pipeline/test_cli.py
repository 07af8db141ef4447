"""What a user meets: messages, exit codes, and that bad input leaves nothing behind."""

import json
import pickle
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.pipeline.conftest import Ended, call
from tnm_pipeline.engines import verify_artifact
from tnm_pipeline.training.sources import digits_cnn

Tnm = Callable[..., Ended]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--help",), 0, ""),
        (("--version",), 0, ""),
        (("run", "--config", "small.toml", "--set", "train.epoch=3"), 2, "did you mean epochs"),
        (("run", "--config", "small.toml", "--set", "nonsense.key=3"), 2, "unknown key nonsense"),
        (("run", "--config", "small.toml", "--set", "sparsity.pattern=5:4"), 2, "pattern 5:4 is impossible"),
        (("run", "--config", "small.toml", "--pattern", "2-4"), 2, "write N:M"),
        (("run", "--config", "small.toml", "--set", "train.lr=nan"), 2, "train.lr"),
        (("run", "--config", "small.toml", "--set", "train.lr"), 2, "section.key=value"),
        (("run", "--config", "absent.toml"), 2, "does not exist"),
        (("run",), 2, "which model?"),
        (("train", "--model", "digits-cnn"), 2, "which data?"),
        (("run", "--config", "small.toml", "--model", "nothing"), 3, "digits-cnn"),
        (("run", "--config", "small.toml", "--model", "absent_module:function"), 3, "absent_module"),
        (("run", "--config", "small.toml", "--set", "sparsity.include=['nope*']"), 3, "not included by nope"),
        (("convert", "absent.safetensors", "--config", "small.toml"), 3, "does not exist"),
        (("inspect", "absent.onnx"), 3, "is no file"),
        (("verify", "absent.plan"), 3, "absent.plan"),
        (("frobnicate",), 2, "No such command"),
    ],
)
def test_exit_codes_and_messages(tnm: Tnm, arguments: tuple[str, ...], code: int, said: str) -> None:
    ended = tnm(*arguments)
    assert ended.code == code, ended.err
    assert said in " ".join(ended.err.split())
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("content", ["[run", "[run]\nseed = 1\nseed = 2", "\x00", "[train]\nepochs = 'three'"])
def test_malformed_config(tnm: Tnm, tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.toml").write_text(content, encoding="utf-8")
    ended = tnm("run", "--config", "bad.toml")
    assert ended.code == 2
    assert "bad.toml" in ended.err


def test_a_folder_that_is_a_file(tnm: Tnm, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    ended = tnm("run", "--config", "small.toml", "--folder", "taken")
    assert ended.code == 2
    assert "--folder" in ended.err
    assert (tmp_path / "taken").read_text(encoding="utf-8") == "mine"


def test_nan_weights_are_refused_by_name(tnm: Tnm, tmp_path: Path) -> None:
    state = digits_cnn(4).state_dict()
    state["3.weight"][0, 0, 0, 0] = float("nan")
    save_file(state, tmp_path / "bad.safetensors")
    ended = tnm("convert", "bad.safetensors", "--config", "small.toml")
    assert ended.code == 3
    assert "3.weight" in ended.err
    assert not (tmp_path / "run/convert").exists()


class Dropper:
    """Unpickling this writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tnm: Tnm, tmp_path: Path, legacy: bool) -> None:
    target = tmp_path / "dropped"
    if legacy:
        (tmp_path / "bad.pt").write_bytes(pickle.dumps({"weight": Dropper(target)}))
    else:
        torch.save({"weight": Dropper(target)}, tmp_path / "bad.pt")
    ended = tnm("convert", "bad.pt", "--config", "small.toml")
    assert ended.code == 3, ended.err
    assert "state_dict" in ended.err
    assert not target.exists()


def test_a_checkpoint_of_another_model(tnm: Tnm, tmp_path: Path) -> None:
    save_file(digits_cnn(8).state_dict(), tmp_path / "wide.safetensors")
    ended = tnm("convert", "wide.safetensors", "--config", "small.toml")
    assert ended.code == 3
    assert "has shape" in ended.err


def test_convert_then_export_without_a_config(small_run: Path, tmp_path: Path) -> None:
    """The two commands of the README: everything else is in the checkpoint's own record."""
    shutil.copy(small_run / "run/dense/model.safetensors", tmp_path / "dense.safetensors")
    ended = call(tmp_path, "convert", "dense.safetensors", "--pattern", "2:4", "--folder", "out", "--json")
    assert ended.code == 0, ended.err
    checkpoint = tmp_path / "out/convert/model.safetensors"
    weight = load_file(checkpoint)["3.weight"].permute(0, 2, 3, 1).reshape(-1, 4)
    assert int((weight != 0).sum(1).max()) <= 2
    ended = call(tmp_path, "export", "out/convert/model.safetensors", "--folder", "out2", "--json")
    assert ended.code == 0, ended.err
    assert (tmp_path / "out2/export/model.fp16.onnx").exists()
    assert not (tmp_path / "out2/build").exists()


def test_a_source_that_only_the_checkpoint_names_is_not_imported(small_run: Path, tmp_path: Path) -> None:
    from tnm_pipeline.training.checkpoint import Checkpoint, read_checkpoint, save_checkpoint

    good = read_checkpoint(small_run / "run/dense/model.safetensors")
    evil = {**good.record, "model": {"source": "evil:model", "args": {}}}
    save_checkpoint(tmp_path / "evil.safetensors", Checkpoint(good.tensors, good.masks, evil))
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath('ran').touch()\n", encoding="utf-8")
    ended = call(tmp_path, "convert", "evil.safetensors")
    assert ended.code == 2
    assert "--trust-source" in ended.err
    assert not (tmp_path / "ran").exists()


MINE = """import torch
def model(width=16):
    return torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.ReLU(), torch.nn.Linear(width, 3))
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder with a model and data of the user."""
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 8)).astype(np.float32)
    y = x[:, :3].argmax(1)
    np.savez(tmp_path / "data.npz", x_train=x[:90], y_train=y[:90], x_test=x[90:], y_test=y[90:])
    return tmp_path


def test_a_model_and_data_of_the_user(mine: Path) -> None:
    ended = call(
        mine,
        *("train", "--model", "mine:model", "--data", "data.npz", "--folder", "out", "--json"),
        *("--set", "model.args={width=32}", "--set", "train.epochs=3"),
    )
    assert ended.code == 0, ended.err
    assert ended.json()["stages"]["train"]["result"]["layers"][0]["violations"] == 0


def test_export_goes_on_from_the_usual_folder_and_never_trains_again(mine: Path) -> None:
    quick = ("--set", "train.epochs=1", "--set", "verify.max_drop=100")
    ended = call(mine, "train", "--model", "mine:model", "--data", "data.npz", *quick)
    assert ended.code == 0, ended.err
    trained = (mine / "runs/default/train/model.safetensors").read_bytes()
    (mine / "plot.py").write_text("print('has nothing to do with it')\n", encoding="utf-8")
    ended = call(mine, "export", "--json")
    assert ended.code == 0, ended.err
    assert ended.json()["stages"]["train"]["cached"]
    assert call(mine, "export", "--set", "train.epochs=2").code == 2
    assert call(mine, "export").code == 0  # the refused setting is not remembered
    (mine / "mine.py").write_text(MINE.replace("ReLU", "Tanh"), encoding="utf-8")
    ended = call(mine, "export")
    assert ended.code == 2
    assert "would be replaced" in ended.err
    assert (mine / "runs/default/train/model.safetensors").read_bytes() == trained


@pytest.mark.parametrize("rule", ['sparsity.include=["nope"]', 'sparsity.include=["re:("]', "sparsity.pattern=16:32-T"])
def test_rules_that_leave_no_layer_are_refused_before_any_training(mine: Path, rule: str) -> None:
    ended = call(mine, "train", "--model", "mine:model", "--data", "data.npz", "--set", rule)
    assert ended.code == 3, ended.err
    assert not (mine / "runs/default/dense/model.safetensors").exists()


def test_inspect_counts_what_is_in_the_file(small_run: Path) -> None:
    for name in ("train/model.safetensors", "export/model.fp16.onnx"):
        rows = call(small_run, "inspect", f"run/{name}", "--json").json()["rows"]
        sparse = [row for row in rows if row["pattern"]]
        assert len(sparse) == 3
        assert all(row["violations"] == row["violations_transposed"] == 0 for row in sparse)
        assert all(0.3 < row["density"] <= 0.5 for row in sparse)
    rows = call(small_run, "inspect", "run/dense/model.safetensors", "--pattern", "2:4", "--json").json()["rows"]
    assert all(row["violations"] > 0 for row in rows if row["shape"][1] >= 4)


def test_a_plan_without_a_gpu(small_run: Path) -> None:
    from tnm_pipeline.engines.driver import probe

    if probe().gpus:
        pytest.skip("this machine has a GPU")
    plan = "run/build/model.fp16.plan"
    refused = call(small_run, "verify", plan)
    assert refused.code == 4
    assert "onnxruntime" in refused.err
    answered = call(small_run, "verify", plan, "--fallback", "onnxruntime")
    assert answered.code == 0, answered.err
    assert "needs a GPU" in answered.out


@pytest.mark.parametrize("where", [0, 100, -1])
def test_one_flipped_byte_in_a_plan(small_run: Path, tmp_path: Path, where: int) -> None:
    shutil.copytree(small_run / "run", tmp_path / "run")
    plan = tmp_path / "run/build/model.fp16.plan"
    content = bytearray(plan.read_bytes())
    content[where] ^= 1
    plan.write_bytes(content)
    ended = call(tmp_path, "verify", "run/build/model.fp16.plan", "--fallback", "onnxruntime")
    assert ended.code == 3
    assert "sha256" in ended.err


def test_the_engine_to_deploy_is_one_of_the_two_plans(small_run: Path) -> None:
    built = json.loads((small_run / "run/build/result.json").read_text(encoding="utf-8"))
    assert (built["engine"]["twin"], built["engine"]["key"]) == ("sparse", "not-measured")
    engine, plan = small_run / "run/build/engine.plan", small_run / "run/build/model.fp16.plan"
    assert engine.read_bytes() == plan.read_bytes()
    assert verify_artifact(engine).sparse_weights_flag is True
    layers = built["verdict"]["layers"]
    assert {layer["picked"] for layer in layers} == {None}  # nothing was observed without a GPU
    assert {layer["why"][0]["key"] for layer in layers if layer["eligible"]} == {"rtx-silent"}


def test_a_model_repository(small_run: Path, tmp_path: Path) -> None:
    """TensorRT for RTX has no Triton backend, so the ONNX file goes there; nothing is exported again."""
    shutil.copytree(small_run / "run", tmp_path / "run")
    command = ("export", "--trt", "--folder", "run", "--triton", "models", "--json")
    ended = call(tmp_path, *command)
    assert ended.code == 0, ended.err
    assert all(stage["cached"] for name, stage in ended.json()["stages"].items() if name != "verify")
    assert "Triton model: models/run/1, from run/export/model.fp16.onnx (Triton has no backend for plans" in ended.err
    sources = ("--model", "digits-cnn", "--data", "digits")
    refused = call(tmp_path, "export", "--folder", "a run", *sources, "--triton", "models")
    assert refused.code == 2
    assert "'a run' cannot be a model's name" in refused.err
    served = tmp_path / "models/run/1/model.onnx"
    assert served.read_bytes() == (tmp_path / "run/export/model.fp16.onnx").read_bytes()
    assert verify_artifact(served).precision == "fp16"
    assert 'backend: "onnxruntime"' in (tmp_path / "models/run/config.pbtxt").read_text(encoding="utf-8")


CANCELLING = """
from torch import nn
class Net(nn.Sequential):
    def forward(self, x): return super().forward((x * 3000 + x) - x * 3000)
def net():
    return Net(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 10))
"""


def test_a_half_precision_that_differs_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(CANCELLING, encoding="utf-8")
    keys = ("run.routes=['train']", "train.epochs=1", "trt.enabled=false", "verify.max_drop=100")
    given = ("--model", "nets:net", "--data", "digits", "--folder", "run", *(f"--set={key}" for key in keys))
    ended = call(tmp_path, "run", *given)
    assert ended.code == 5, ended.err
    assert "model.fp16.onnx differs from torch at output 'output'" in ended.err
    assert "bisect" in ended.err
    assert (tmp_path / "run/export/model.fp16.onnx.rejected").is_file()
    assert not (tmp_path / "run/export/model.fp16.onnx").exists()
    found = call(tmp_path, "bisect", "run/export/model.fp32.onnx", "run/export/model.fp16.onnx.rejected", "--json")
    assert found.code == 0, found.err
    advice = shlex.split(found.json()["command"])
    again = call(tmp_path, "run", *given, *advice[advice.index("--set") :])
    assert again.code == 0, again.err


def test_an_accuracy_gate_that_fails(small_run: Path, tmp_path: Path) -> None:
    shutil.copytree(small_run, tmp_path / "copy")
    dense = tmp_path / "dense.safetensors"
    shutil.copy(small_run / "run/dense/model.safetensors", dense)
    ended = call(
        tmp_path / "copy",
        *("run", "--config", "small.toml", "--set", "run.routes=['convert']", "--set", "verify.max_drop=0"),
        *("--set", "convert.method=magnitude", "--pattern", "1:4-T", "--set", "trt.enabled=false", "--json"),
    )
    assert ended.code == 5, ended.err
    assert "points below dense" in ended.err
    scores = ended.json()["stages"]["verify"]["result"]["scores"]  # what was measured is not lost
    assert scores["onnx fp32"] < scores["dense"]
    assert "points below dense" in (tmp_path / "copy/run/report.html").read_text(encoding="utf-8")


USERS = """
import torch
from torch import nn

class Two(nn.Linear):
    def forward(self, x, y): return x + y

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)
    def forward(self, x): return self.layer(x.flatten(1)), x

class Asserts(Pair):
    def forward(self, x): assert x.shape[1] == 99

def two(): return Two(4, 4)
def pair(): return Pair()
def asserts(): return Asserts()
def nothing(): return nn.Flatten()
def raises(): raise KeyError("inside")
"""


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("two", "missing 1 required positional argument"),
        ("pair", "returns a tuple: it must return one tensor"),
        ("asserts", "AssertionError"),
        ("nothing", "no parameters"),
        ("raises", "raised KeyError: 'inside'"),
    ],
)
def test_a_model_that_cannot_be_used_is_no_bug_of_ours(tnm: Tnm, tmp_path: Path, model: str, said: str) -> None:
    (tmp_path / "users_models.py").write_text(USERS, encoding="utf-8")
    ended = tnm("train", "--model", f"users_models:{model}", "--data", "digits", "--folder", "out")
    assert ended.code == 3, ended.err
    assert said in ended.err
    assert "bug" not in ended.err


def test_given_weights_and_data_that_do_not_fit(tnm: Tnm, tmp_path: Path) -> None:
    save_file(digits_cnn(4).state_dict(), tmp_path / "given.safetensors")
    x, y = np.zeros((8, 3, 8, 8), np.float32), np.arange(8) % 4
    np.savez(tmp_path / "colour.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    ended = tnm("convert", "given.safetensors", "--config", "small.toml", "--data", "colour.npz")
    assert ended.code == 3, ended.err
    assert "does not take the data's inputs of shape (2, 3, 8, 8)" in ended.err


def test_converting_a_checkpoint_of_the_same_folder_does_not_destroy_it(
    tnm: Tnm, small_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_run / "run", tmp_path / "run")
    checkpoint = tmp_path / "run/dense/model.safetensors"
    before = checkpoint.read_bytes()
    ended = tnm("convert", "run/dense/model.safetensors", "--folder", "run")
    assert ended.code == 2, ended.err
    assert "--folder" in ended.err
    assert checkpoint.read_bytes() == before


def test_a_corrupt_training_state_is_named(tnm: Tnm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("train", "--config", "small.toml")
    with monkeypatch.context() as patch:
        patch.setattr("tnm_pipeline.pipeline.learn.save_checkpoint", _stop)
        assert tnm(*arguments).code == 130
    state = tmp_path / "run/dense/state.safetensors"
    state.write_bytes(state.read_bytes()[:-7])
    ended = tnm(*arguments)
    assert ended.code == 3, ended.err
    assert "delete it to start over" in ended.err
    state.unlink()
    assert tnm(*arguments).code == 0


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_next_command_can_be_pasted(tnm: Tnm, tmp_path: Path) -> None:
    (tmp_path / "users_digits.py").write_text(
        "from tnm_pipeline.training.sources import digits_mlp\ndef model():\n    return digits_mlp(8)\n",
        encoding="utf-8",
    )
    given = ("--config", "small.toml", "--set", "model.args={}", "--model", "users_digits:model")
    ended = tnm("train", *given, "--set", "train.epochs=1", "--folder", "a run")
    assert ended.code == 0, ended.err
    following = shlex.split(ended.out.rpartition("next: ")[2])
    assert following == ["tnm-pipeline", "export", "--trt", "--folder", "a run"]
    assert tnm(*following[1:]).code == 0
    assert (tmp_path / "a run/build/model.fp16.plan").exists()


def test_doctor_names_a_remedy_for_everything_that_does_not_work(tnm: Tnm) -> None:
    ended = tnm("doctor", "--json")
    assert ended.code == 0, ended.err
    findings = ended.json()
    assert len(findings) >= 6
    assert all(finding["works"] or finding["remedy"] for finding in findings)
    remedies = [finding["remedy"] for finding in findings if finding["remedy"]]
    printed = tnm("doctor").out
    assert remedies
    assert all(f"-> {remedy}" in printed for remedy in remedies)


def test_three_lines_of_python_without_torch(small_run: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, numpy as np\n"
        "from tnm_pipeline.engines import load\n"
        "with load('run/build/model.fp16.plan', fallback='onnxruntime') as session:\n"
        "    answer = session.run({'input': np.zeros((3, 1, 8, 8), np.float32)})\n"
        "print(answer['output'].shape, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=small_run, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] in ("(3, 10) False",)
