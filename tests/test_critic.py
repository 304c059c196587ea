"""The timed critic: it begins as the network, and then tells times apart."""

import pytest
import torch
from tiny import TEXT_HIDDEN_SIZE, tiny_transformer

from diffusers_tbcm.critic import TimedCritic
from diffusers_tbcm.flow import FlowTransformer, flow_prediction
from diffusers_tbcm.matching import critic_loss, merge_critic


@pytest.fixture
def network():
    return FlowTransformer(tiny_transformer())


def inputs(rows=4, prompts=2):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(rows, 4, 8, 8, generator=generator)
    text = torch.randn(prompts, 3, TEXT_HIDDEN_SIZE, generator=generator)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    return sample, torch.linspace(0.1, 0.9, rows), text, mask


def test_it_begins_as_the_network_whatever_it_is_told(network):
    critic = TimedCritic(network, TEXT_HIDDEN_SIZE)
    with torch.no_grad():
        expected = network(*inputs())
        torch.testing.assert_close(critic(*inputs(), drawn_at=torch.rand(4)), expected)


def test_rows_of_one_prompt_are_told_apart_in_their_order(network):
    critic = TimedCritic(network, TEXT_HIDDEN_SIZE)
    torch.nn.init.normal_(critic.drawn_at_embedder.linear_2.weight)
    drawn_at = torch.tensor([0.2, 0.9, 0.5, 1.0])
    sample, tau, text, mask = inputs()
    with torch.no_grad():
        together = critic(sample, tau, text, mask, drawn_at=drawn_at)
        for row in range(4):
            one = slice(row, row + 1)
            prompt = slice(row // 2, row // 2 + 1)
            alone = critic(sample[one], tau[one], text[prompt], mask[prompt], drawn_at=drawn_at[one])
            torch.testing.assert_close(together[one], alone, atol=1e-5, rtol=1e-4)
        other = critic(sample, tau, text, mask, drawn_at=drawn_at.flip(0))
    assert (other - together).abs().amax((1, 2, 3)).min() > 1e-3


def test_it_learns_that_predictions_differ_by_their_time():
    """Predictions are 1 at s = 1 and -1 at s = .3: a critic that is not told s is left with their variance."""
    losses = {}
    for timed in (False, True):
        torch.manual_seed(0)
        network = FlowTransformer(tiny_transformer().requires_grad_(True))
        critic = TimedCritic(network, TEXT_HIDDEN_SIZE) if timed else network
        optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3)
        generator = torch.Generator().manual_seed(0)
        text, found = inputs(prompts=1)[2], []
        for _ in range(150):
            drawn_at = torch.where(torch.rand(16, generator=generator) < 0.5, 1.0, 0.3)
            prediction = torch.where(drawn_at == 1, 1.0, -1.0).view(-1, 1, 1, 1).expand(-1, 4, 8, 8)
            noise = torch.randn(16, 4, 8, 8, generator=generator)
            tau = torch.full((16,), 0.98)  # next to nothing of the prediction is left to see
            told = {"drawn_at": drawn_at} if timed else {}
            velocity = critic(0.02 * prediction + 0.98 * noise, tau, text, **told)
            loss = critic_loss(velocity, prediction, noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sample = 0.02 * prediction + 0.98 * noise
            found.append((flow_prediction(sample, velocity.detach(), tau) - prediction).square().mean())
        losses[timed] = torch.stack(found[-30:]).mean().item()
    assert losses[True] < 0.6 * losses[False]


def test_the_student_flows_into_the_network_and_the_embedder_stays(network):
    student = FlowTransformer(tiny_transformer())
    critic = TimedCritic(network, TEXT_HIDDEN_SIZE)
    torch.nn.init.ones_(critic.drawn_at_embedder.linear_2.weight)
    merge_critic(critic, student, 1.0)
    weights = dict(critic.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in student.named_parameters())
    assert (weights["drawn_at_embedder.linear_2.weight"] == 1).all()
