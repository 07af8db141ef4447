"""Options that several commands share, or that need a word of explanation."""

from pathlib import Path
from typing import Annotated, Literal

import typer

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file of the run.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one key.")]
FolderOption = Annotated[Path | None, typer.Option("--folder", "-o", help="Run folder: results, cache and report.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Built-in name, hf:FOLDER_OR_NAME or module:function.")
]
DataOption = Annotated[
    str | None, typer.Option("--data", help="Built-in name, .npz, .tsv or .csv file, image folder or module:function.")
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        "--calibration", help="Unlabelled inputs: .npz, .txt, .tsv, .csv, image folder, hf:NAME, module:function."
    ),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop; nothing is written.")]
PatternOption = Annotated[str | None, typer.Option("--pattern", help="2:4, 2:4-T, 4:8 ...: N kept of M, -T both ways.")]
TrustOption = Annotated[bool, typer.Option("--trust-source", help="Import the module:function a checkpoint names.")]
WhatIfOption = Annotated[
    str | None, typer.Option("--what-if", metavar="PATTERNS", help="What these would keep of a checkpoint: 2:4,2:4-T.")
]
FallbackOption = Annotated[Literal["error", "onnxruntime"], typer.Option(help="What a plan that cannot run here does.")]
SizeOption = Annotated[
    list[str] | None, typer.Option("--size", metavar="NAME=N", help="Size of another dimension that varies.")
]
TritonOption = Annotated[
    Path | None, typer.Option("--triton", metavar="DIR", help="Add the model to this Triton model repository.")
]
TrustedOption = Annotated[
    list[Path] | None,
    typer.Option("--trusted", metavar="KEY.pem", help="Demand a signature by this public key, or one of several."),
]
PasswordOption = Annotated[
    Path | None, typer.Option("--password-file", help="The password of the private key: the first line of a file.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Results as JSON on stdout.")]
