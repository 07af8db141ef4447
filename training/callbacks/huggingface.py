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
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tnm_pipeline.training.atomic import write_atomically
from tnm_pipeline.training.callbacks.shared import go_on, scale_rate
from tnm_pipeline.training.checkpoint import CheckpointError
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import Recipe, recipe_named
from tnm_pipeline.training.selection import Selection
from tnm_pipeline.training.sparsify import LayerReport, Sparsifier

MASKS = "sparsifier.safetensors"  # in every checkpoint folder of the Trainer
_RECORD = "tnm_pipeline.sparsifier"


class SparsifierCallback(TrainerCallback):  # type: ignore[misc]  # untyped in transformers
    """Trains the Trainer's model with masks, from the start of training to its end.

    Steps are the Trainer's optimizer steps: accumulation does not count. Checkpoints hold the masks besides the model,
    and resuming goes on with them.

    Attributes:
        sparsifier: while training runs, and after it; `None` before.
        report: a row for every prunable layer, once training is through.
        masks: layer name -> bool mask, once training is through.
    """

    def __init__(
        self,
        pattern: Pattern | str,
        recipe: Recipe | str = "dynamic",
        *,
        selection: Selection | None = None,
        scale_lr: bool = True,
    ) -> None:
        """Prepare; the model changes when training starts.

        Args:
            pattern: `Pattern` or its text form.
            recipe: `Recipe` or the name of one.
            selection: which layers; default: all but the last.
            scale_lr: multiply the learning rate by what the recipe asks for: `learning_rate` is then that of dense
                training.

        Raises:
            PatternError, ValueError: the text form is wrong, or there is no such recipe.
        """
        self.pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
        self.recipe = recipe_named(recipe) if isinstance(recipe, str) else recipe
        self.selection = selection
        self.scale_lr = scale_lr
        self.sparsifier: Sparsifier | None = None
        self.report: list[LayerReport] = []
        self.masks: dict[str, Tensor] = {}

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
        self.sparsifier = Sparsifier(
            model, bare, self.pattern, self.recipe, selection=self.selection, total_steps=state.max_steps
        )
        if state.global_step:
            folder = args.resume_from_checkpoint
            if not isinstance(folder, str):
                folder = f"{args.output_dir}/{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            _restore(self.sparsifier, Path(folder) / MASKS)
        elif self.scale_lr and self.recipe.lr_scale != 1.0:
            scale_rate(bare, [getattr(lr_scheduler, "scheduler", lr_scheduler)], self.recipe.lr_scale)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put the masks and the counters beside the model."""
        if self.sparsifier is not None and state.is_world_process_zero:
            assert args.output_dir is not None  # TrainingArguments sees to it
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            _save(self.sparsifier, folder / MASKS)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the zeros, verify them, and give the plain layers back."""
        assert self.sparsifier is not None
        self.report, self.masks = self.sparsifier.finalize()


def _save(sparsifier: Sparsifier, path: Path) -> None:
    tensors = {name: tensor.detach().cpu() for name, tensor in sparsifier.buffers().items()}
    write_atomically(path, serialize(tensors, metadata={_RECORD: json.dumps(sparsifier.state_dict())}))


def _restore(sparsifier: Sparsifier, path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})[_RECORD])
            buffers = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} holds no masks ({error}): resume from a checkpoint that was written with SparsifierCallback, "
            "and name its folder in TrainingArguments(resume_from_checkpoint=...) if it is elsewhere"
        ) from error
    go_on(sparsifier, buffers, state, str(path))
