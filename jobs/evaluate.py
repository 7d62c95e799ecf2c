"""Evaluate weights on a data set; a run keeps the result and its predictions.

    ray job submit --working-dir . -- python jobs/evaluate.py s3://runs/vlmo/vqa_base --data s3://vqa/val --device gpu

All options of `vlmo evaluate` can be given. On a cluster that has no nodes yet, `--device gpu` makes it add them, and
`--workers` says on how many GPUs.
"""

import sys

from vlmo_ray.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["evaluate"]
    main()
