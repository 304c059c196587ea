#!/usr/bin/env python
"""Distil a Sana pipeline with discrete consistency (LCM, arXiv 2310.04378), for comparison with TBCM.

    accelerate launch examples/tbcm/train_lcm.py \
        --pretrained_model_name_or_path Efficient-Large-Model/Sana_Sprint_0.6B_1024px_teacher_diffusers \
        --train_data_dir pictures --output_dir outputs/lcm-sana-0.6b --mixed_precision bf16

The loop is that of train_tbcm_distill.py. Rows are latents of pictures, noised to a time of the teacher's ODE solver;
the student's prediction there is to agree with its own prediction one step of that solver later.
"""

from distill_args import parse_args
from methods import LCM
from train_tbcm_distill import main


if __name__ == "__main__":
    main(parse_args(description=__doc__, method=LCM), LCM)
