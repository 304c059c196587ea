#!/usr/bin/env python
"""Distil a Sana pipeline with Sana-Sprint (arXiv 2503.09641), sCM and LADD, for comparison with TBCM.

    accelerate launch examples/tbcm/train_sana_sprint.py \
        --pretrained_model_name_or_path Efficient-Large-Model/Sana_Sprint_0.6B_1024px_teacher_diffusers \
        --train_data_dir pictures --output_dir outputs/sprint-sana-0.6b --mixed_precision bf16

The loop is that of train_tbcm_distill.py with the rows of train_scm.py. To sCM's loss comes that of a discriminator,
heads on blocks of the frozen teacher, which is updated in every step together with the student.
"""

from distill_args import parse_args
from methods import SANA_SPRINT
from train_tbcm_distill import main


if __name__ == "__main__":
    main(parse_args(description=__doc__, method=SANA_SPRINT), SANA_SPRINT)
