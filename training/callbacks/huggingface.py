"""Sparse training in the Trainer of Hugging Face transformers: one callback.

```python
sparsity = SparsifierCallback("2:4-T")
trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[sparsity])
trainer.train()               # or trainer.train(resume_from_checkpoint=True)
trainer.save_model(folder)    # plain layers, zeros written
```
"""

import json
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tnm_pipeline.training.atomic import write_atomically
from tnm_pipeline.training.callbacks.shared import Saved, Sparsifying
from tnm_pipeline.training.checkpoint import CheckpointError
from tnm_pipeline.training.distributed import full
from tnm_pipeline.training.sparsify import Sparsifier

MASKS = "sparsifier.safetensors"  # in every checkpoint folder of the Trainer
_STATE, _WEIGHTS = "tnm_pipeline.sparsifier", "tnm_pipeline.weights"


class SparsifierCallback(Sparsifying, TrainerCallback):  # type: ignore[misc]  # untyped in transformers
    """Trains the Trainer's model with masks.

    Steps are the Trainer's optimizer steps: accumulation does not count. Checkpoints hold the masks besides the model,
    and resuming goes on with them.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Any,
        lr_scheduler: Any,
        **_: Any,
    ) -> None:
        """Swap the layers; on a resumed training, with the masks of its checkpoint."""
        bare: Optimizer = getattr(optimizer, "optimizer", optimizer)  # out of Accelerate's wrapper
        scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)
        saved = None
        if state.global_step:
            resumed = args.resume_from_checkpoint
            folder = Path(resumed) if isinstance(resumed, str) else _folder(args, state)
            saved = _read(folder / MASKS, model)
        self.begin(model, bare, [scheduler], state.max_steps, saved)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put the masks and the counters beside the model."""
        if self.sparsifier is not None:
            digest = _digest(self.sparsifier.model, self.sparsifier.masks())  # of whole weights: by all processes
            if state.is_world_process_zero:
                _write(self.sparsifier, digest, _folder(args, state) / MASKS)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Give the plain layers back."""
        self.end()


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Of the checkpoint of this step."""
    assert args.output_dir is not None  # TrainingArguments sees to it
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _write(sparsifier: Sparsifier, digest: str, path: Path) -> None:
    tensors = {name: tensor.detach().cpu() for name, tensor in sparsifier.buffers().items()}
    metadata = {_STATE: json.dumps(sparsifier.state_dict()), _WEIGHTS: digest}
    write_atomically(path, serialize(tensors, metadata=metadata))


def _digest(model: nn.Module, layers: Iterable[str]) -> str:
    """Of the weights that the masks belong to."""
    digest = sha256()
    for name in sorted(layers):
        weight = full(model.get_submodule(name).get_parameter("weight")).cpu().contiguous()
        digest.update(weight.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, model: nn.Module) -> Saved:
    """What was saved with the weights that the model has now.

    Raises:
        CheckpointError: no file of masks, or of other weights.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state, digest = json.loads(metadata[_STATE]), metadata[_WEIGHTS]
            buffers = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} holds no masks ({error}): resume from a checkpoint that was written with SparsifierCallback, "
            "and name its folder in TrainingArguments(resume_from_checkpoint=...) if it is elsewhere"
        ) from error
    layers = [name.removesuffix(".mask") for name in buffers if name.endswith(".mask")]
    try:
        same = _digest(model, layers) == digest
    except AttributeError:
        same = False
    if not same:
        raise CheckpointError(
            f"{path} has masks of other weights than those that training goes on with: name the checkpoint's folder in "
            "TrainingArguments(resume_from_checkpoint=...) as well, and keep the model's structure"
        )
    return Saved(buffers, state, str(path))
