"""Pre-train VLMo on the paper's four million images (section 4.1): 200k steps of 1,024 pairs.

    ray job submit --working-dir . -- python jobs/pretrain_4m.py base \\
        --data s3://cc3m,s3://sbu,s3://coco,s3://vg --storage s3://runs/vlmo

The first word is the size: base, base_plus or large. Submit it again after any failure: it continues from the newest
checkpoint. All options of `vlmo train` can be given.
"""

import sys

from vlmo_ray.cli import main

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("base", "base_plus", "large"):
        sys.exit("pretrain_4m: name the size first: base, base_plus or large")
    sys.argv[1:2] = ["train", f"pretrain_{sys.argv[1]}"]
    main()
