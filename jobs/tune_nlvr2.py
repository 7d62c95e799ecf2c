"""Search the learning rate of NLVR2 fine-tuning at 224 px, as the paper's ablations do: 5e-5 or 1e-4.

    ray job submit --working-dir . -- python jobs/tune_nlvr2.py --data s3://nlvr2/train \\
        --eval-data s3://nlvr2/dev --storage s3://runs/vlmo --set init=s3://runs/vlmo/pretrain_base

Submit it again after any failure: trials that have ended are not repeated, the others continue from their checkpoints.
The recipe declares what is searched; `--space` searches something else, `--trials` and `--at-once` say how much.
"""

import sys

from vlmo_ray.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["tune", "nlvr2_base_224"]
    main()
