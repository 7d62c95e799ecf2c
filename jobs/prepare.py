"""Turn records of a public format into shuffled shards with a manifest, on all nodes of the cluster.

    ray job submit --working-dir . -- python jobs/prepare.py parquet s3://raw/laion s3://pairs/web

All options of `vlmo prepare` can be given. Submit it again after any failure: it continues.
"""

import sys

from vlmo_ray.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["prepare"]
    main()
