"""Which of the two plans is deployed: the faster one where that can be measured, or the one that was asked for."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tnm_pipeline.engines import EnvironmentLacks, load
from tnm_pipeline.engines.artifact import read_manifest, write_manifest
from tnm_pipeline.engines.driver import probe
from tnm_pipeline.export.latency import LatencyTable, claim
from tnm_pipeline.export.reasons import finding
from tnm_pipeline.pipeline.config import Config
from tnm_pipeline.pipeline.foreign import made_up
from tnm_pipeline.pipeline.turns import sessions_for, time_in_turns

ENGINE = "engine.plan"


def deploy(config: Config, plans: Mapping[str, Path]) -> dict[str, Any]:
    """Copy one of the plans, and its manifest, to `engine.plan` beside them.

    Args:
        config: `trt.keep` says which one; `faster` needs a GPU, and keeps the sparse one where there is none.
        plans: `sparse` and `dense`.

    Returns:
        Which one, why, and the measurement if there was one; JSON-able.
    """
    chosen, why, table = _choose(config, plans)
    target = plans[chosen].with_name(ENGINE)
    shutil.copyfile(plans[chosen], target)
    write_manifest(target, replace(read_manifest(plans[chosen]), artifact=ENGINE))
    return {"file": ENGINE, "twin": chosen, **why, "latency": None if table is None else table.to_dict()}


def _choose(config: Config, plans: Mapping[str, Path]) -> tuple[str, dict[str, str], LatencyTable | None]:
    wanted = config.trt.keep
    if wanted != "faster":
        return wanted, {"key": "asked-for", "why": f"trt.keep = {wanted}"}, None
    driver = probe()
    if driver.reason is not None:
        return _unmeasured(driver.reason)
    try:
        return decide(_time(config, plans))
    except EnvironmentLacks as error:  # such as a GPU that the plans were not built for
        return _unmeasured(str(error))


def _unmeasured(why: str) -> tuple[str, dict[str, str], None]:
    return "sparse", {"key": "not-measured", "why": finding("not-measured", why=why).message}, None


def decide(table: LatencyTable) -> tuple[str, dict[str, str], LatencyTable]:
    """The dense twin where it was seen to be faster; the sparse plan otherwise, which loses nothing that was seen.

    Args:
        table: `sparse` against `dense`.
    """
    found = claim(table, "sparse")
    return "dense" if found.key == "dense-faster" else "sparse", {"key": found.key, "why": found.sentence}, table


def _time(config: Config, plans: Mapping[str, Path]) -> LatencyTable:
    """Time both at the usual sizes of the first profile."""
    manifest = read_manifest(plans["sparse"])
    profile = manifest.profiles[0] if manifest.profiles else {}
    sizes = {dim: usual for dim, (_, usual, _) in profile.items()}
    return time_in_turns(
        {name: partial(load, path) for name, path in plans.items()},
        made_up(manifest.inputs, sizes),
        baseline="dense",
        rounds=config.verify.latency_rounds,
        samples=sizes.get("batch", 1),
        sessions=sessions_for(plans.values()),
    )
