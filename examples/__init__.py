"""Named as a package, so that `python -m examples.tbcm.mini_teacher...` from the checkout means this folder."""
