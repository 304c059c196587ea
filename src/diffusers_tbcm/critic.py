"""CDM's critic: the velocity of the distribution that the student draws, told at what time it was drawn."""

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn

from .flow import FlowTransformer


CHANNELS = 256  # of the time's sinusoids, as in the transformers
TIME_SCALE = 1000  # for these sinusoids


class TimedCritic(FlowTransformer):
    """A critic F(z, tau | s) of predictions D(x_s, s), which are another distribution at every time s of a rollout.

    A critic that is not told s fits their mixture. Then the mixture is matched to the teacher and its parts are not:
    where guidance acts most, at large s, predictions end up too strong, and at small s too weak, so that more steps
    draw paler pictures. Here an embedding of s is added to that of every token: at first nothing, so that the critic
    begins as the network. It is ours; arXiv 2605.06376 has none.

    Args:
        network: the velocity to begin with; its transformer is held, not copied.
        width: of the prompt embeddings.
    """

    def __init__(self, network: FlowTransformer, width: int) -> None:
        super().__init__(network.transformer, network.timestep_scale, network.backbone)
        self.sinusoids = Timesteps(CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.drawn_at_embedder = TimestepEmbedding(CHANNELS, CHANNELS, out_dim=width)
        nn.init.zeros_(self.drawn_at_embedder.linear_2.weight)
        nn.init.zeros_(self.drawn_at_embedder.linear_2.bias)

    def forward(  # type: ignore[override]
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
        *,
        drawn_at: torch.Tensor,
    ) -> torch.Tensor:
        """Evaluate F(z, tau | s); else as `FlowTransformer`.

        Args:
            sample: z, (batch, channels, height, width).
            timestep: tau in [0, 1], (batch,).
            encoder_hidden_states, encoder_attention_mask, pooled_projections: as `FlowTransformer` takes them.
            drawn_at: s of the predictions that z was made of, in [0, 1], (batch,).

        Returns:
            F, the shape of `sample`.
        """
        rows = len(sample) // len(encoder_hidden_states)
        embedding = self.drawn_at_embedder(self.sinusoids(TIME_SCALE * drawn_at).to(encoder_hidden_states.dtype))
        text = encoder_hidden_states.repeat_interleave(rows, 0) + embedding[:, None]
        mask, pooled = (
            None if part is None else part.repeat_interleave(rows, 0)
            for part in (encoder_attention_mask, pooled_projections)
        )
        return super().forward(sample, timestep, text, mask, pooled_projections=pooled)
