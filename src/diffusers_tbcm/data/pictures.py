from .latents import CaptionedImages  # noqa: F401
