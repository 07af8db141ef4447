"""Checkpoints: one safetensors file, written atomically, with weights, masks and what built them.

A file of ours holds the model's state under its own names, `mask/<layer>` as packed bits, and one JSON record in the
header under `tnm_pipeline`. (One record, because safetensors does not keep the order of several: equal content gives
equal bytes.) Foreign files are read too: safetensors, and `.pt` with tensors only.
"""

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from tnm_pipeline.training.atomic import write_atomically

_RECORD = "tnm_pipeline"
_MASK = "mask/"
_SCHEMA = 1
_LISTED = 5  # offenders named in an error before the rest is counted


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit: missing, corrupt, unsafe, NaN, or for another model."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights and what is known of them.

    Attributes:
        tensors: the model's state_dict.
        masks: layer name -> bool mask of the weight's shape.
        record: JSON-able facts: `model` and `data` (source and arguments), `layers` (name -> pattern), `stage`.
            Empty for foreign files.
    """

    tensors: dict[str, Tensor]
    masks: dict[str, Tensor] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically. The same content gives the same bytes.

    Args:
        path: a `.safetensors` file.
        checkpoint: what to write; tensors may be on any device.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    for layer, mask in checkpoint.masks.items():
        bits = np.packbits(mask.detach().cpu().numpy().reshape(-1))
        tensors[_MASK + layer] = torch.from_numpy(bits)
    record = json.dumps({"schema": _SCHEMA, **checkpoint.record}, sort_keys=True)
    write_atomically(path, serialize(unshared(tensors), metadata={_RECORD: record}))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint without running any code from it.

    Args:
        path: `.safetensors` (ours or foreign), or `.pt`/`.pth`/`.bin` that holds a state_dict, plain or under
            `state_dict` or `model`.

    Returns:
        The checkpoint, on the CPU.

    Raises:
        CheckpointError: missing, truncated, another file in disguise, holds code, or has NaN, Inf or 4-bit weights.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    _refuse_disguises(path)
    checkpoint = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    _refuse_bad_weights(path, checkpoint.tensors)
    return checkpoint


def load_into(model: nn.Module, checkpoint: Checkpoint, path: Path) -> None:
    """Copy the weights into a model of the same structure.

    Args:
        model: plain (not sparsified).
        checkpoint: what to copy.
        path: where it came from, for messages.

    Raises:
        CheckpointError: names or shapes differ; the first five, the count, and the closest names.
    """
    problems = misfits(model, checkpoint.tensors)
    if problems:
        raise CheckpointError(f"{path} does not fit the model: {problems}. Is it the right model source?")
    model.load_state_dict(checkpoint.tensors)


def misfits(model: nn.Module, given: Mapping[str, Tensor]) -> str:
    """Names and shapes that differ: the first five, the count, and the closest names; empty if none does.

    Args:
        model: any.
        given: what should be its state_dict.
    """
    expected = model.state_dict()
    problems = [_missing(name, given) for name in expected if name not in given]
    problems += [f"{name} is not in the model" for name in given if name not in expected]
    problems += [
        f"{name} has shape {tuple(given[name].shape)}, the model wants {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    return _list(problems)


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory (tied weights): safetensors refuses them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return result


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}; copy or download it again") from error
    if _RECORD not in metadata:
        return Checkpoint(tensors)
    record = _parse_record(path, metadata[_RECORD])
    packed = {name.removeprefix(_MASK): tensors.pop(name) for name in list(tensors) if name.startswith(_MASK)}
    masks = {layer: _unpack_mask(path, layer, bits, tensors) for layer, bits in packed.items()}
    return Checkpoint(tensors, masks, record)


def _parse_record(path: Path, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"the record in {path} is corrupt ({error}); write the file again") from error
    if not isinstance(record, dict) or record.pop("schema", None) != _SCHEMA:
        raise CheckpointError(f"{path} was written by another version of tnm-pipeline; write it again with this one")
    return record


def _unpack_mask(path: Path, layer: str, bits: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    weight = weights.get(f"{layer}.weight")
    if weight is None:
        raise CheckpointError(f"{path} has a mask for {layer} but no {layer}.weight; write the file again")
    count = weight.numel()
    if bits.dtype != torch.uint8 or bits.shape != (-(-count // 8),):
        raise CheckpointError(
            f"{path}: the mask of {layer} is {bits.dtype} {tuple(bits.shape)}, but {count} weights need "
            f"uint8 ({-(-count // 8)},); write the file again"
        )
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool)).reshape(weight.shape)


def _read_torch(path: Path) -> Checkpoint:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile as error:
        with path.open("rb") as file:
            if file.read(2) == b"PK":  # how torch.save's archives start
                raise CheckpointError(f"{path} is cut off or damaged ({error}); copy or download it again") from error
        raise CheckpointError(
            f"{path} is not a checkpoint that is safe to read: legacy pickle files run code when opened. Save the "
            "state_dict again with torch.save, or better with safetensors.torch.save_file"
        ) from error
    if any("/code/" in entry.filename or PurePosixPath(entry.filename).name == "archive_format" for entry in entries):
        raise CheckpointError(f"{path} holds a program (TorchScript or torch.export); save its state_dict instead")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path} is a compressed archive; torch.save never writes those, so it may be a zip bomb")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, KeyError ... for bad content
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path} holds more than tensors{f' ({found[1]})' if found else ''} and was not opened, because pickles "
            "can run code. Save only model.state_dict()"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} does not hold a state_dict; save model.state_dict()")
    size = path.stat().st_size
    for name, tensor in content.items():
        if tensor.numel() * tensor.element_size() > size:
            raise CheckpointError(
                f"{path}: {name} claims {tensor.numel()} elements of {tensor.dtype}, more than the {size} bytes of "
                "the file hold; save its contiguous() copy"
            )
    return Checkpoint(dict(content))


def _refuse_disguises(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if not start:
        raise CheckpointError(f"{path} is empty: copy or download it again")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull`")
    if start[:1] == b"<":
        raise CheckpointError(f"{path} is a web page, not weights: the download failed; fetch it again")


def _refuse_bad_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    packed = [name for name, tensor in tensors.items() if tensor.dtype == torch.float4_e2m1fn_x2]
    if packed:
        raise CheckpointError(f"{path} has 4-bit floats in {_list(packed)}, which torch only stores: dequantize first")
    bad = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(_testable(tensor)).all())
    ]
    if bad:
        raise CheckpointError(f"{path} has NaN or Inf in {_list(bad)}: go back to the last good checkpoint")


def _testable(tensor: Tensor) -> Tensor:
    """Floats of 8 bits in more: torch does not test all of them for NaN."""
    return tensor.float() if tensor.itemsize == 1 else tensor


def _missing(name: str, given: Mapping[str, Tensor]) -> str:
    close = get_close_matches(name, given, n=1)
    return f"{name} is missing" + (f" (closest: {close[0]})" if close else "")


def _list(items: list[str]) -> str:
    rest = len(items) - _LISTED
    return "; ".join(items[:_LISTED]) + (f"; and {rest} more" if rest > 0 else "")
