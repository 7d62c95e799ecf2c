"""Pre-train in the paper's stages (section 3.4): images, then texts, then pairs.

    ray job submit --working-dir . -- python jobs/pretrain_stages.py base --images s3://imagenet --texts s3://books \\
        --pairs s3://pairs --storage s3://runs/vlmo

The first word is base, base_plus, large or tiny. Each stage is a run of its own that begins from the one before. Submit
it again after any failure: stages that are done are passed over, and the others continue from their newest checkpoint.
`--images ""` leaves the first stage out; `--init` then names what to begin from, an imported BEiT for example.
`--start-vl-experts image` starts the vision-language experts as copies (Table 4); by default they are random, as in the
released program.
"""

import tyro

from vlmo_ray.cli import report_mistakes

if __name__ == "__main__":
    from vlmo_ray.stages import pretrain_stages

    report_mistakes(tyro.cli)(pretrain_stages)
