"""How most stock pipelines are asked for classifier-free guidance."""


def guidance_arguments(guidance_scale: float, prompts: int) -> dict[str, float]:
    """Give a guidance scale as arguments of the stock pipeline's call, which guides by the empty prompt.

    Args:
        guidance_scale: classifier-free guidance weight; 1 for none.
        prompts: how many the call is given.

    Returns:
        The arguments.
    """
    return {"guidance_scale": guidance_scale}
