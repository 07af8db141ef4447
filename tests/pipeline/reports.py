"""A run folder as the report finds it, how to change one, and a page as a browser would see it."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tnm_pipeline.pipeline.config import load_config

RUN = Path(__file__).parent / "data" / "report"  # results of a real run on digits, curves and mask corner trimmed
ALL = ("dense", "train", "convert", "prune", "convert-unstructured", "best", "export", "build", "verify")


class Page(HTMLParser):
    """What a browser would find: attributes, the text that a person reads, scripts by type."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.scripts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs).get("type") or "", ""))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)
        elif "style" not in self.open:
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def config_text(folder: Path, *overrides: str) -> str:
    return load_config(RUN / "config.toml", overrides, {"run.folder": str(folder)}).to_toml()


def edit(folder: Path, stage: str, change: Any) -> None:
    path = folder / stage / "result.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    change(result)
    path.write_text(json.dumps(result), encoding="utf-8")


def save_weights(folder: Path, stage: str) -> None:
    """Layer 3 with three equal weights in two of its four rows, two in each column; layer 10 of ones."""
    three = torch.tensor([[1.0, 1, 1, 0], [1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 1]])
    save_file({"3.weight": three, "10.weight": torch.ones(8, 8)}, folder / stage / "model.safetensors")


def keep(folder: Path, stages: tuple[str, ...]) -> None:
    for stage in ALL:
        if stage not in stages:
            shutil.rmtree(folder / stage)
