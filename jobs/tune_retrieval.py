"""Search the learning rate of retrieval fine-tuning on COCO.

    ray job submit --working-dir . -- python jobs/tune_retrieval.py --data s3://coco/train \\
        --eval-data s3://coco/val --storage s3://runs/vlmo --set init=s3://runs/vlmo/pretrain_base

Submit it again after any failure: trials that have ended are not repeated, the others continue from their checkpoints.
The recipe declares what is searched; `--space` searches something else, `--trials` and `--at-once` say how much.
"""

import sys

from vlmo_ray.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["tune", "retrieval_coco_base"]
    main()
