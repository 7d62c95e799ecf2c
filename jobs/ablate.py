"""The paper's ablations (Tables 4 to 7) at small scale: equal steps for every row, three seeds, a verdict each.

    ray job submit --working-dir . -- python jobs/ablate.py --pairs s3://pairs/train --eval-pairs s3://pairs/val \\
        --task-data s3://vqa/train --task-eval s3://vqa/val --storage s3://runs/ablations

Submit it again after any failure: rows that have a result are not repeated, and the others go on where they stopped.
"""

import tyro

from vlmo_ray.cli import report_mistakes

if __name__ == "__main__":
    from vlmo_ray.ablate import ablate

    report_mistakes(tyro.cli)(ablate)
