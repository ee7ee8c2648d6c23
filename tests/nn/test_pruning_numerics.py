"""Models that prune stay finite, in float32 and bfloat16, and do the same under the same seed."""

import pytest
import torch
from test_pruning import pack_of, tiny
from torch import Tensor

import foveate as fv
import laws
from foveate.errors import FoveateError
from foveate.geometry.soft_estimators import ESTIMATORS
from foveate.nn.pruner import Pruning, Scores
from foveate.tasks.predict import logits_of


def pack_with(pixels: Tensor) -> fv.Patches:
    leaves = fv.uniform_leaves(tuple(pixels.shape[1:]), 4)
    return fv.patchify(pixels, leaves, 4)


def noise_of(seed: int) -> Tensor:
    return torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("decoder", ["sparse", "unetr"])
@pytest.mark.parametrize("content", ["zero", "constant", "huge", "tiny"])
def test_finite_for_every_finite_input(content: str, decoder: str, estimator: str) -> None:
    pixels = {
        "zero": torch.zeros(2, 32, 32),
        "constant": torch.full((2, 32, 32), 7.0),
        "huge": 1e4 * noise_of(0),
        "tiny": 1e-20 * noise_of(0),
    }[content]
    model = tiny(decoder=decoder, estimator=estimator)
    out = model(pack_with(pixels), Pruning(noise=torch.Generator().manual_seed(0)))
    out.square().mean().backward()
    assert bool(out.isfinite().all())
    assert all(weight.grad is not None and bool(weight.grad.isfinite().all()) for weight in model.parameters())


def test_a_broken_image_harms_no_other() -> None:
    """NaN reaches every token of its image through attention and no token of another; prediction refuses the result."""
    pixels = noise_of(0)
    pixels[0, 5, 5] = float("nan")
    model, good = tiny().eval(), pack_with(noise_of(1))
    with torch.no_grad():
        out = model(fv.pack([pack_with(pixels), good]))
        assert bool(out[: len(out) // 2].isnan().all())
        torch.testing.assert_close(out[len(out) // 2 :], model(good), rtol=1e-5, atol=1e-5)
    with pytest.raises(FoveateError, match="the model's output holds NaN or Inf; train it again"):
        logits_of(model, pack_with(pixels))


@pytest.mark.parametrize("name", ["scd_vit_tiny", "scd_vit_tiny_3d"])
def test_half_precision_is_near_single(name: str) -> None:
    """The same choice is forced, so that what differs is rounding alone."""
    model, patches = tiny(name), pack_of(2 if name == "scd_vit_tiny" else 3)

    def run(half: bool) -> tuple[Tensor, Tensor, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            out = model(patches, Pruning(keep_ratio=1.0)).float()
        out.square().mean().backward()
        gradient = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
        scores: list[Scores] = []
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            model(patches, Pruning(scores=scores))
        return out.detach(), gradient, scores[0].score

    for single, half, most in zip(run(False), run(True), (0.05, 0.15, 0.05), strict=True):
        assert half.dtype == torch.float32
        assert bool(half.isfinite().all())
        assert float((half - single).norm() / single.norm()) < most


def test_scores_in_half_precision_have_no_more_ties() -> None:
    model, patches = tiny(), pack_of()
    scores: list[Scores] = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(patches, Pruning(scores=scores))
    assert len(scores[0].score.unique()) == len(scores[0].score)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_is_the_same_under_the_same_seed(estimator: str) -> None:
    model, patches = tiny(estimator=estimator), pack_of()

    def step() -> list[Tensor]:
        model.zero_grad()
        out = model(patches, Pruning(noise=torch.Generator().manual_seed(3)))
        out.square().mean().backward()
        return [out.detach(), *(weight.grad.clone() for weight in model.parameters() if weight.grad is not None)]

    laws.deterministic(step)
