"""Pre-train VLMo-Large on one billion noisy pairs (paper section 4.2).

    ray job submit --working-dir . -- python jobs/pretrain_1b.py --data s3://pairs/laion --storage s3://runs/vlmo

200k steps of 16,384 pairs, then 100k of 32,768, as two phases of one run. Submit it again after any failure: it
continues from the newest checkpoint. `--tiny` takes the same code path with a model and a schedule for a laptop.
"""

import sys
from dataclasses import dataclass

import tyro

from vlmo_ray.errors import UserError
from vlmo_ray.launch.fit import fit
from vlmo_ray.overrides import override
from vlmo_ray.recipes import recipe


@dataclass
class Arguments:
    data: str  # the data set: s3://bucket/prefix or a folder
    storage: str  # where the run is kept: s3://bucket/prefix or a folder
    name: str = "pretrain_1b"
    tiny: bool = False
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()


if __name__ == "__main__":
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        config = override(recipe("pretrain_1b_tiny" if arguments.tiny else "pretrain_1b"), list(arguments.set))
        fit(config, arguments.data, arguments.storage, arguments.name)
    except UserError as error:
        sys.exit(f"pretrain_1b: {error}")
