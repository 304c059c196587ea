"""What is FLUX.2 [klein]'s own beside what every family has: places, the shift of times, which of its kind will do."""

import json
import math

import pytest
import torch
from families import FAMILIES

from diffusers_tbcm.pipeline_folder import flow_shift


if "flux2_klein" not in FAMILIES:
    pytest.skip("this diffusers has no FLUX.2 [klein]", allow_module_level=True)

from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from diffusers_tbcm.backbones.flux2_klein import _places, load_transformer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    saved = tmp_path_factory.mktemp("klein")
    FAMILIES["flux2_klein"].make_pipeline().save_pretrained(saved)
    return saved


def test_places_are_the_stock_pipelines():
    device = torch.device("cpu")
    assert torch.equal(_places(3, 5, 1, device), Flux2KleinPipeline._prepare_latent_ids(torch.zeros(1, 4, 3, 5))[0])
    assert torch.equal(_places(1, 1, 7, device), Flux2KleinPipeline._prepare_text_ids(torch.zeros(1, 7, 4))[0])


@pytest.mark.parametrize("tokens", [16, 1024, 4096])
def test_the_students_shift_is_the_stock_pipelines_at_200_steps(folder, tokens):
    assert flow_shift(folder, tokens) == pytest.approx(math.exp(compute_empirical_mu(tokens, 200)), rel=1e-4)


@pytest.mark.parametrize(
    ("file", "entry"), [("model_index.json", "is_distilled"), ("transformer/config.json", "guidance_embeds")]
)
def test_a_network_without_an_unconditional_branch_is_refused(folder, file, entry):
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, entry: True}))
    with pytest.raises(ValueError, match=rf"\(`{entry}`\): give a klein \*base\*"):
        load_transformer(folder)
    (folder / file).write_text(json.dumps(config))
    load_transformer(folder)
