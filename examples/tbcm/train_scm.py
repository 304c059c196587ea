#!/usr/bin/env python
"""Distil a Sana text-to-image pipeline with sCM (arXiv 2410.11081) on captioned pictures, for comparison with TBCM.

    accelerate launch examples/tbcm/train_scm.py \
        --pretrained_model_name_or_path Efficient-Large-Model/Sana_Sprint_0.6B_1024px_teacher_diffusers \
        --train_data_dir pictures --output_dir outputs/scm-sana-0.6b --mixed_precision bf16

The loop is that of train_tbcm_distill.py, with other rows in its steps 1 to 4: the latent of a picture, noised to a
logit-normal time, and the teacher's velocity there. r warms up to 1 and stays.
"""

from distill_args import parse_args
from methods import SCM
from train_tbcm_distill import main


if __name__ == "__main__":
    main(parse_args(description=__doc__, method=SCM), SCM)
