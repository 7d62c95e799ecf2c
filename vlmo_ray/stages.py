"""Pre-training in the paper's stages (section 3.4): images, texts, pairs; each is a run that begins from the last."""

from __future__ import annotations

import dataclasses
import threading
from typing import Literal

from tyro.conf import Positional

from vlmo_ray.config import Config, check
from vlmo_ray.data.mix import load_data
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.launch.fit import fit
from vlmo_ray.launch.stop import Stopped
from vlmo_ray.recipes import recipe

Size = Literal["base", "base_plus", "large", "tiny"]
_PAIRS = {"tiny": "demo"}  # size -> recipe of the last stage; others: pretrain_<size>


def stages_of(size: Size, images: str, texts: str, pairs: str) -> dict[str, str]:
    """The recipes of the stages in order, each with its data set; stages without data are left out."""
    everything = {f"vision_{size}": images, f"language_{size}": texts, _PAIRS.get(size, f"pretrain_{size}"): pairs}
    return {name: data for name, data in everything.items() if data}


def pretrain_stages(
    size: Positional[Size],
    images: str,
    texts: str,
    pairs: str,
    storage: str,
    *,
    init: str = "",
    start_text_experts: Literal["", "image"] = "",
    start_vl_experts: Literal["", "image", "text"] = "",
    steps: int = 0,
) -> Store:
    """Trains the stages that have data, as runs `storage`/<recipe>; returns the last one.

    Called again it passes over stages that are done, and goes on with the others from their newest checkpoints. Experts
    start as copies where that is asked for (paper Table 4): those of texts in the first stage that trains them, those
    of pairs in the last.

    Args:
        size: base, base_plus, large or tiny.
        images: the data set of the vision stage; "": no such stage.
        texts: the data set of the language stage; "": no such stage.
        pairs: the data set of the last stage; "": no such stage.
        storage: where the runs are kept.
        init: what the first stage begins from, for example an imported BEiT.
        start_text_experts: a copy of the vision experts, or "": as they are.
        start_vl_experts: a copy of those, or "": as they are (random, as in the released program).
        steps: above 0, of every stage, for a try.
    """
    stages = stages_of(size, images, texts, pairs)
    if not stages:
        raise UserError("no stage has data; name images, texts or pairs")
    configs: dict[str, Config] = {}
    for name, data in stages.items():
        load_data(data)  # before the first stage, which may take weeks
        config = recipe(name)
        if steps:
            phases = tuple(dataclasses.replace(phase, steps=steps) for phase in config.phases)
            optim = dataclasses.replace(config.optim, warmup_steps=min(config.optim.warmup_steps, steps // 10))
            config = dataclasses.replace(config, phases=phases, optim=optim)
        if name.startswith("vision"):
            configs[name] = check(dataclasses.replace(config, init=init))
        else:
            first = all(earlier.startswith("vision") for earlier in configs)
            copies = {"start_text_experts": start_text_experts if first else ""}
            copies["start_vl_experts"] = "" if name.startswith("language") else start_vl_experts
            configs[name] = check(dataclasses.replace(config, init=init, **copies))
        init = f"{storage.rstrip('/')}/{name}"
    stop, last = threading.Event(), None
    for name, config in configs.items():
        if stop.is_set():  # the signal came when a stage was all but done
            raise Stopped(f"ended on request before the stage {name}; the same command goes on from there")
        last = fit(config, stages[name], storage, stop=stop)
    assert last is not None
    return last
