"""Pre-train VLMo-Large on one billion noisy pairs (paper section 4.2).

    ray job submit --working-dir . -- python jobs/pretrain_1b.py --data s3://pairs/web --storage s3://runs/vlmo

200k steps of 16,384 pairs, then 100k of 32,768, as two phases of one run. Submit it again after any failure: it
continues from the newest checkpoint. `--tiny` takes the same code path with a model and a schedule for a laptop. All
options of `vlmo train` can be given, for example `--set cluster.max_workers=64`.
"""

import sys

from vlmo_ray.cli import main

if __name__ == "__main__":
    recipe = "pretrain_1b"
    if "--tiny" in sys.argv:
        sys.argv.remove("--tiny")
        recipe = "pretrain_1b_tiny"
    sys.argv[1:1] = ["train", recipe]
    main()
