"""Tampers with artifacts and reports what the loader made of each, as JSON on stdout.

`main` works in a process of its own, where an import of a runtime is refused and counted: what was not imported has
deserialized nothing.
"""

import importlib.abc
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from tests.engines.tampering import ARTIFACTS, pick, tamper
from tnm_pipeline.engines import ArtifactRejected, EnvironmentLacks, load, verify_artifact

FALLBACKS: tuple[Literal["error", "onnxruntime"], ...] = ("error", "onnxruntime")
RUNTIMES = ("onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_bindings", "tensorrt_rtx_bindings", "onnx", "torch")


class Guard(importlib.abc.MetaPathFinder):
    """Refuses to import a runtime, and remembers who asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in RUNTIMES:
            self.asked.append(name)
            raise ImportError(f"{name} is not to be imported here")


def outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except (ArtifactRejected, EnvironmentLacks) as error:
        return type(error).__name__
    except Exception as error:  # whatever else it is, it is a finding
        return f"CRASHED with {type(error).__name__}: {error}"
    return "accepted"


def main(folder: Path, count: int, seed: int) -> None:
    """Tamper `count` times.

    Args:
        folder: Holds `good/`, signed artifacts, and `keys/`, the key they are signed with and a stranger's.
        count: How many times.
        seed: Of all that is drawn.
    """
    guard = Guard()
    sys.meta_path.insert(0, guard)
    trusted = [folder / "keys/signing-key.pub.pem"]
    kinds: Counter[str] = Counter()
    classes: Counter[str] = Counter()
    findings: list[str] = []
    work = folder / "work"
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder / "good", work)
        artifact = work / pick(rng, ARTIFACTS)
        kind, agrees = tamper(artifact, number, rng)
        kinds[kind] += 1
        other = kind in ("other_gpu", "other_machine")  # which the ONNX file behind the plan may stand in for
        fallback: Literal["error", "onnxruntime"] = "error" if other else pick(rng, FALLBACKS)
        signed = outcome(partial(load, artifact, trusted_keys=trusted, fallback=fallback))
        if signed not in ("ArtifactRejected", "SignatureRejected"):
            findings.append(f"{number} {kind} of {artifact.name}, with a key: {signed}")
        classes[f"with a key: {signed}"] += 1
        if agrees:
            plain = outcome(partial(verify_artifact, artifact))
            expected = "accepted"
        else:
            plain = outcome(partial(load, artifact, fallback=fallback))
            expected = "EnvironmentLacks" if other else "ArtifactRejected"
        if plain != expected:
            findings.append(f"{number} {kind} of {artifact.name}, without a key: {plain}")
        classes[f"without a key: {plain}"] += 1
    asked = list(guard.asked)
    for name in ARTIFACTS:  # the guard sees what would be imported
        outcome(partial(load, folder / "good" / name))
    report = {
        "tampered": count,
        "kinds": kinds,
        "classes": classes,
        "findings": findings,
        "imported": asked,
        "imported untampered": sorted(set(guard.asked)),
        "modules": sorted(set(RUNTIMES) & set(sys.modules)),
    }
    sys.stdout.write(json.dumps(report))
