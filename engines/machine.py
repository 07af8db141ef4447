"""The operating system and CPU that a plan belongs to. Looked at without importing any runtime."""

import platform
from typing import NamedTuple

from tnm_pipeline.engines.errors import EnvironmentLacks
from tnm_pipeline.engines.manifest import Manifest

_SAME_CPU = {"amd64": "x86_64", "arm64": "aarch64"}  # Windows and macOS have names of their own


class Machine(NamedTuple):
    """What a TensorRT plan depends on besides the GPU.

    Attributes:
        operating_system: `"linux"`, `"windows"`, `"darwin"`.
        cpu_architecture: `"x86_64"`, `"aarch64"`.
    """

    operating_system: str
    cpu_architecture: str


def this_machine() -> Machine:
    """The machine that this process runs on."""
    cpu = platform.machine().lower()
    return Machine(platform.system().lower(), _SAME_CPU.get(cpu, cpu))


def check_machine(manifest: Manifest) -> None:
    """Refuse a plan that was built for another operating system or CPU; imports nothing.

    Args:
        manifest: Of any artifact; one that records no machine runs on all.

    Raises:
        EnvironmentLacks: The manifest records another machine than this one.
    """
    built_for, here = (manifest.operating_system, manifest.cpu_architecture), this_machine()
    if built_for not in ((None, None), here):
        raise EnvironmentLacks(
            f"{manifest.artifact} was built for {' on '.join(map(str, built_for))}, and this machine is "
            f"{' on '.join(here)}: a {manifest.backend} plan does not move between them. Build it here with "
            "`tnm-pipeline export --trt`"
        )
