"""From a command line to a complete configuration: sources that a checkpoint remembers are filled in."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tnm_pipeline.pipeline.cache import HUB
from tnm_pipeline.pipeline.config import Config, load_config, stated
from tnm_pipeline.pipeline.errors import ConfigError

DEMO = Path(__file__).with_name("demo.toml")

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_DECIDED_BY = {
    "run.folder": "--folder",
    "run.routes": "the command (`tnm-pipeline run` takes run.routes)",
    "model.source": "--model",
    "model.checkpoint": "the argument CHECKPOINT",
    "data.source": "--data",
    "sparsity.pattern": "--pattern",
    "calibration.source": "--calibration",
    "export.checkpoint": "the argument CHECKPOINT",
    "trt.enabled": "--trt",
}


def resolve(
    path: Path | None,
    overrides: Sequence[str],
    options: dict[str, Any],
    *,
    remembers: Path | None = None,
    trust_source: bool = False,
    needs_labels: bool = True,
) -> Config:
    """Read the configuration and find out which model and data it is about.

    Args:
        path: TOML file, or None.
        overrides: of `--set`.
        options: dotted key -> value or None, from command line options.
        remembers: a checkpoint of ours, whose record fills in a missing model or data source.
        trust_source: import `module:function` named by the checkpoint. Without it only built-in names are taken from a
            file, because importing runs code.
        needs_labels: without, unlabelled calibration data will do where no data set is known.

    Raises:
        ConfigError: a source is missing, or named by the checkpoint but not trusted; an override says something else
            than an option.
        CheckpointError: the checkpoint to start from, or the reference of a conversion, does not exist.
    """
    _check_agreement(overrides, options)
    config = load_config(path, overrides, options)
    for checkpoint in (config.export.checkpoint or config.model.checkpoint, config.convert.reference):
        if checkpoint:
            check_checkpoint(checkpoint)
    filled = dict(options)
    record = _record_of(remembers) if remembers else {}
    for section in ("model", "data"):
        if getattr(config, section).source:
            continue
        known = record.get(section)
        if not isinstance(known, dict) or not isinstance(known.get("source"), str) or not known["source"]:
            if section == "data" and config.calibration.source and not needs_labels:
                continue
            unlabelled = "" if section == "model" or needs_labels else ", or --calibration with unlabelled inputs"
            raise ConfigError(
                f"which {section}? Set {section}.source in the config file, or pass --{section} with a built-in name "
                f"or module:function{unlabelled}"
            )
        if ":" in known["source"] and not known["source"].startswith(HUB) and not trust_source:
            raise ConfigError(
                f"{remembers} was made with {section} source {known['source']}, which would be imported and run: pass "
                f"--{section} {known['source']} or --trust-source if you trust it"
            )
        filled[f"{section}.source"], filled[f"{section}.args"] = known["source"], known.get("args")
    return load_config(path, overrides, filled)


def _check_agreement(overrides: Sequence[str], options: dict[str, Any]) -> None:
    """Refuse what would be ignored: an override of a key that the command line sets in another way too."""
    for key, decided in options.items():
        asked = stated(key, overrides=overrides)
        if decided is not None and asked is not None and asked != decided:
            raise ConfigError(
                f"--set {key} = {json.dumps(asked, default=str)} would be ignored: {_DECIDED_BY[key]} decides it, here "
                f"{json.dumps(decided)}. Change that, and leave the --set out"
            )


def _record_of(checkpoint: Path) -> dict[str, Any]:
    """The record in a safetensors header, read without torch; empty for foreign files.

    A broken file is no error here: the stage that reads it whole says what is wrong with it.
    """
    try:
        with checkpoint.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size < 100_000_000 else {}
        record = json.loads(header["__metadata__"]["tnm_pipeline"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return record if isinstance(record, dict) else {}


def check_checkpoint(path: Path) -> None:
    """Refuse what is no checkpoint at the first look, before anything is imported for it.

    Raises:
        CheckpointError: it does not exist, or is a folder or a file of arrays.
    """
    if path.is_dir():
        held = sorted(file for file in path.iterdir() if file.suffix in _WEIGHTS)
        wrong = f"is a folder: give {held[0] if len(held) == 1 else 'the file in it that holds the weights'}"
    elif not path.is_file():
        wrong = "does not exist"
    elif path.suffix in (".npz", ".npy"):
        wrong = f"is an {path.suffix} of arrays, not a checkpoint: give weights, .safetensors or .pt; data go to --data"
    else:
        return
    from tnm_pipeline.training.checkpoint import CheckpointError  # loads torch

    raise CheckpointError(f"checkpoint {path} {wrong}")
