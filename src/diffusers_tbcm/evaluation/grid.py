from .evaluator import image_grid  # noqa: F401
