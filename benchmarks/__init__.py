"""Measurements of this project. Run them from the checkout: `python -m benchmarks.train_step`."""
