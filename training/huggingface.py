"""What comes from Hugging Face: pretrained models, tokenized sentences, data sets.

Models and tokenizers are taken from a folder or from the hub's cache on this machine: nothing is downloaded behind the
user's back, and no code that lies beside the weights is run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tnm_pipeline.training.sources import SourceError, require


def pretrained(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A model of transformers with its weights, in float32 and in evaluation mode.

    Args:
        name: a folder as `save_pretrained` writes it, or a name in the hub's cache.
        arguments: `class`, a model class of transformers; default `AutoModel`. Weights that the class has and the files
            lack, such as a new head, are random; transformers says which.

    Raises:
        SourceError: unknown argument or class, nothing there, or weights that do not fit.
        MissingPackageError: transformers is not installed.
    """
    source = f"model source hf:{name}"
    if unknown := set(arguments) - {"class"}:
        raise SourceError(f"{source} does not take {', '.join(sorted(unknown))}; it takes class")
    transformers = require("transformers", "hf", source)
    class_name = str(arguments.get("class", "AutoModel"))
    model_class: Any = getattr(transformers, class_name, None)
    is_class = isinstance(model_class, type)
    if not is_class or not (
        class_name.startswith("AutoModel") or issubclass(model_class, transformers.PreTrainedModel)
    ):
        raise SourceError(f"{source}: transformers has no model class {class_name}; AutoModel is one")
    model, loading = _from_local(model_class, name, source, output_loading_info=True)
    if set(model.state_dict()) <= set(loading["missing_keys"]):
        raise SourceError(
            f"{source}: no weight in it belongs to a {type(model).__name__}; set class in the model's arguments"
        )
    checked: nn.Module = model.float().eval()
    return checked


@dataclass(frozen=True)
class Tokenization:
    """How sentences become token ids.

    Attributes:
        tokenizer: a folder, or a name in the hub's cache; usually the model's.
        max_length: in tokens, special ones included; longer sentences are cut.

    Raises:
        SourceError: a value that cannot be meant.
    """

    tokenizer: str
    max_length: int = 128

    def __post_init__(self) -> None:
        if not isinstance(self.tokenizer, str) or not self.tokenizer:
            raise SourceError(f"tokenizer must be a folder or a name in the hub's cache, got {self.tokenizer!r}")
        if type(self.max_length) is not int or self.max_length < 1:
            raise SourceError(f"max_length must be a positive integer, got {self.max_length!r}")

    def apply(self, sentences: Sequence[str]) -> list[dict[str, list[int]]]:
        """Tokenize, without padding.

        Args:
            sentences: any text.

        Returns:
            For each sentence what the tokenizer gives to the model: `input_ids`, `attention_mask` and the like.

        Raises:
            SourceError: no such tokenizer, or it refuses the sentences.
            MissingPackageError: transformers is not installed.
        """
        tokenizer, source = self._load()
        try:
            columns = tokenizer(list(sentences), truncation=True, max_length=self.max_length, padding=False)
        except MemoryError:
            raise
        except Exception as error:  # the tokenizers of different models refuse in different ways
            raise SourceError(f"{source} cannot take sentences of max_length {self.max_length}: {error}") from error
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def words(self) -> tuple[int, ...]:
        """Ids that stand for text, in order: without special ones and those that BERT's vocabularies leave unused.

        Raises:
            SourceError: no such tokenizer.
            MissingPackageError: transformers is not installed.
        """
        tokenizer, _ = self._load()
        special = set(tokenizer.all_special_ids)
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        return tuple(
            sorted(
                number
                for token, number in vocabulary.items()
                if number not in special and not token.startswith("[unused")
            )
        )

    def _load(self) -> tuple[Any, str]:
        source = f"tokenizer {self.tokenizer!r}"
        return _from_local(require("transformers", "hf", source).AutoTokenizer, self.tokenizer, source), source


def _from_local(loader: Any, name: str, source: str, **options: Any) -> Any:
    try:
        return loader.from_pretrained(name, local_files_only=True, trust_remote_code=False, **options)
    except MemoryError:
        raise
    except Exception as error:  # files of any kind may lie there
        if Path(name).is_dir():
            raise SourceError(f"{source} cannot be loaded: {error}") from error
        raise SourceError(
            f"{source} is neither a folder nor in the hub's cache; with a network, `hf download {name}` puts it there: "
            f"{error}"
        ) from error


def open_dataset(name: str, split: str | None = None, subset: str | None = None) -> Any:
    """A data set of the `datasets` package, which may download it.

    Args:
        name: a folder as `save_to_disk` writes it, a folder of data files, or a name on the hub.
        split: `None`: `train`, or the only one.
        subset: of a data set that has several.

    Returns:
        A `datasets.Dataset`.

    Raises:
        SourceError: it cannot be loaded, or has no such split.
        MissingPackageError: datasets is not installed.
    """
    source = f"data set hf:{name}"
    datasets = require("datasets", "hf", source)
    try:
        if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            if subset is not None:
                raise SourceError(f"{source} was saved to disk without subsets: leave out subset, got {subset!r}")
            return _split_of(source, datasets.load_from_disk(name), split)
        loaded = datasets.load_dataset(name, subset, split=split)
        return _split_of(source, loaded, None) if split is None else loaded
    except (MemoryError, SourceError):
        raise
    except Exception as error:  # files of any kind may lie there
        raise SourceError(f"{source} cannot be loaded: {type(error).__name__}: {error}") from error


def _split_of(source: str, saved: Any, split: str | None) -> Any:
    known = list(saved) if isinstance(saved, dict) else []
    if not known and split is None:
        return saved
    chosen = split or (known[0] if len(known) == 1 else "train")
    if chosen not in known:
        has = f"it has {', '.join(known)}" if known else "it is a single one: leave split out"
        raise SourceError(f"{source} has no split {chosen!r}; {has}")
    return saved[chosen]
