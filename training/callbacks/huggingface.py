"""Sparse training in the Trainer of Hugging Face transformers: one callback.

```python
sparsity = SparsifierCallback("2:4-T")
trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[sparsity])
trainer.train()               # or trainer.train(resume_from_checkpoint=True)
trainer.save_model(folder)    # plain layers, zeros written
```
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tnm_pipeline.training.atomic import write_atomically
from tnm_pipeline.training.callbacks.shared import Saved, Sparsifying
from tnm_pipeline.training.checkpoint import CheckpointError
from tnm_pipeline.training.sparsify import Sparsifier

MASKS = "sparsifier.safetensors"  # in every checkpoint folder of the Trainer
_STATE = "tnm_pipeline.sparsifier"


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
            saved = _read(folder / MASKS)
        self.begin(model, bare, [scheduler], state.max_steps, saved)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put the masks and the counters beside the model."""
        if self.sparsifier is not None and state.is_world_process_zero:
            _write(self.sparsifier, _folder(args, state) / MASKS)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Give the plain layers back."""
        self.end()


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Of the checkpoint of this step."""
    assert args.output_dir is not None  # TrainingArguments sees to it
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _write(sparsifier: Sparsifier, path: Path) -> None:
    tensors = {name: tensor.detach().cpu() for name, tensor in sparsifier.buffers().items()}
    write_atomically(path, serialize(tensors, metadata={_STATE: json.dumps(sparsifier.state_dict())}))


def _read(path: Path) -> Saved:
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})[_STATE])
            buffers = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} holds no masks ({error}): resume from a checkpoint that was written with SparsifierCallback, "
            "and name its folder in TrainingArguments(resume_from_checkpoint=...) if it is elsewhere"
        ) from error
    return Saved(buffers, state, str(path))
