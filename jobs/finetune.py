"""Fine-tune for a task: VQA, NLVR2, retrieval, entailment, classification.

    ray job submit --working-dir . -- python jobs/finetune.py vqa_base --data s3://vqa/train \\
        --storage s3://runs/vlmo --set init=s3://runs/vlmo/pretrain_base

The first word is a recipe (`vlmo recipes` lists them). Submit it again after any failure: it continues from the newest
checkpoint. All options of `vlmo train` can be given; `--from-sweep URI` takes the best settings of a sweep.
"""

import sys

from vlmo_ray.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["train"]
    main()
