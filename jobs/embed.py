"""Write a vector for every image or text of a data set, on all nodes of the cluster.

    ray job submit --working-dir . -- python jobs/embed.py s3://runs/vlmo --data s3://pairs/web --out s3://index/web

All options of `vlmo embed` can be given. Submit it again after any failure: it continues.
"""

import sys

from vlmo_ray.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["embed"]
    main()
