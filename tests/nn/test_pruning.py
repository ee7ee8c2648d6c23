"""Pruning and assembly: exact counts, neutrality, nothing lost, a scorer that gets a gradient."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import foveate as fv
import laws
from foveate.errors import BudgetError, ConfigError
from foveate.models import create_config
from foveate.nn.attention import Packing
from foveate.nn.pruner import Pruning, Scores, TokenPruner, keep_counts
from foveate.nn.scorer import TokenScorer

TINY = {"width": 16, "depth": 4, "num_heads": 2, "patch_size": 4, "pos_grid": 4, "decoder_width": 4}
POINTS = {"prune_after": (0, 2), "keep_ratio": (0.5, 0.25)}
COMPLETIONS = ["none", "cross", "block", "mask", "last"]


def tiny(name: str = "scd_vit_tiny", **changes: object) -> fv.SegmentationModel:
    torch.manual_seed(0)
    model = fv.create_model(name, in_chans=2, num_classes=3, **{**TINY, **POINTS, **changes})  # type: ignore[arg-type]
    with torch.no_grad():  # fresh projections of zero would hide what completion does
        for key, value in model.named_parameters():
            if "assembler" in key:
                value.add_(torch.randn_like(value) * 0.1)
    return model


def pack_of(num_dims: int = 2, seed: int = 0, side: int = 64, max_leaves: int = 100) -> fv.Patches:
    side = side if num_dims == 2 else side // 2
    image = torch.randn(2, *(side,) * num_dims, generator=torch.Generator().manual_seed(seed))
    return fv.patchify(image, fv.adaptive_leaves(image, max_leaves=max_leaves, min_size=4), 4)


@pytest.mark.parametrize(
    ("length", "ratio", "stages", "counts"),
    [
        (1728, 0.1, 3, (173, 17, 16)),  # released: 172, 17, 1
        (1000, 0.1, 3, (100, 16, 16)),  # released: 99, 9, 0
        (10, 0.1, 3, (10, 10, 10)),  # released: 1, 0 and a crash
        (216, 0.1, 3, (22, 16, 16)),  # released: 21, 2, 0: the class token alone
        (4096, 0.25, 3, (1024, 256, 64)),
        (4096, (0.5, 0.25, 0.25), 3, (2048, 1024, 1024)),
        (1, 1.0, 2, (1, 1)),
    ],
)
def test_counts_are_exact_and_cannot_collapse(
    length: int, ratio: float | tuple[float, ...], stages: int, counts: tuple[int, ...]
) -> None:
    assert keep_counts(length, ratio, stages) == counts


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (0.0, r"keep_ratio=0.0 must lie in \(0, 1\]"),
        (1.5, r"keep_ratio=1.5 must lie in \(0, 1\]"),
        (float("nan"), "keep_ratio=nan must lie"),
        ((0.25, 0.5), "never rise"),
        ((0.5,), "has 1 shares for 2 prune points"),
    ],
)
def test_impossible_ratios(ratio: float | tuple[float, ...], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        keep_counts(100, ratio, 2)


@pytest.mark.parametrize("points", [(3,), (1, 0), (-1,), (0, 0)])
def test_prune_points_lie_before_the_last_block(points: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"must ascend within 0\.\.2, before the last of 4 blocks"):
        create_config("apf_vit_tiny", depth=4, prune_after=points)


@pytest.mark.parametrize("stage", [2, -3])
def test_active_stages_are_prune_points(stage: int) -> None:
    with pytest.raises(ConfigError, match=rf"active_stage={stage} is no index into prune_after=\(0, 2\)"):
        tiny(active_stage=stage)


@pytest.mark.parametrize(("stage", "kept"), [(0, 50), (1, 25), (-1, 25)])
def test_tokens_that_a_stage_kept_are_decoded_finely(stage: int, kept: int) -> None:
    model, patches, seen = tiny(active_stage=stage), pack_of(), []
    model.decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["active"]), with_kwargs=True)
    model(patches)
    parts = model.encoder(patches).parts
    assert torch.equal(seen[0], torch.cat([part.rows for part in parts[-1 if kept == 25 else 1 :]]).sort().values)
    assert abs(len(seen[0]) - kept) <= 1


@pytest.mark.parametrize("changes", [{"completion": "all"}, {"scorer": "big"}, {"estimator": "magic"}])
def test_unknown_parts_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="choose one"):
        tiny(**changes)


@pytest.mark.parametrize("decoder", ["sparse", "token"])
@pytest.mark.parametrize("completion", ["none", "cross", "last"])
@pytest.mark.parametrize("num_dims", [2, 3])
def test_keeping_everything_is_the_unpruned_model(num_dims: int, completion: str, decoder: str) -> None:
    """Neutrality: at keep_ratio=1 the logits are those of the model without prune points."""
    suffix = "" if num_dims == 2 else "_3d"
    pruning = tiny(f"scd_vit_tiny{suffix}", completion=completion, decoder=decoder).eval()
    settings = {**TINY, "decoder": decoder}
    plain = fv.create_model(f"apf_vit_tiny{suffix}", in_chans=2, num_classes=3, **settings).eval()  # type: ignore[arg-type]
    state = pruning.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    patches = pack_of(num_dims)
    torch.testing.assert_close(pruning(patches, Pruning(keep_ratio=1.0)), plain(patches), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(pruning(patches), plain(patches), atol=1e-3)


@pytest.mark.parametrize("num_dims", [2, 3])
def test_every_token_leaves_once(num_dims: int) -> None:
    """Inverse: the parts hold every position of the pack once, and a token's last state is what it left with."""
    model = tiny("scd_vit_tiny" if num_dims == 2 else "scd_vit_tiny_3d", num_registers=2)
    packs = [pack_of(num_dims, seed, side, leaves) for seed, (side, leaves) in enumerate([(64, 100), (32, 30), (8, 4)])]
    patches = fv.pack(packs)
    scores: list[Scores] = []
    out = model.encoder(patches, Pruning(scores=scores))
    rows = torch.cat([part.rows for part in out.parts])
    assert torch.equal(rows.sort().values, torch.arange(len(patches.pixels)))
    for image, length in enumerate(patches.lengths):
        left = [part.lengths[image] for part in out.parts]
        after = keep_counts(length, POINTS["keep_ratio"], 2)  # type: ignore[arg-type]
        assert left == [length - after[0], after[0] - after[1], after[1]]
    for part in out.parts:
        assert torch.equal(part.rows, part.rows.sort().values)
        assert torch.equal(out.hidden[-1][part.rows], part.x)
    assert out.prefix.shape == (3, 3, 16)
    reached = [len(score.rows) for score in scores]
    assert reached == [len(patches.pixels), len(out.parts[1].rows) + len(out.parts[2].rows)]


@pytest.mark.parametrize("completion", COMPLETIONS)
@pytest.mark.parametrize("rope", [False, True])
def test_an_image_has_the_same_answer_in_any_company(completion: str, rope: bool) -> None:
    model = tiny(completion=completion, rope=rope).eval()

    def apply(batch: list[fv.Patches]) -> list[Tensor]:
        patches = fv.pack(batch)
        return list(model(patches).split(list(patches.lengths)))

    samples = [pack_of(seed=0), pack_of(seed=1, side=32, max_leaves=30), pack_of(seed=2, side=8, max_leaves=4)]
    laws.batch_invariance(apply, samples, tolerance=1e-5)


@pytest.mark.parametrize("completion", COMPLETIONS)
def test_the_place_in_the_sequence_carries_no_meaning(completion: str) -> None:
    model, patches = tiny(completion=completion).eval(), pack_of()
    order = torch.randperm(len(patches.pixels), generator=torch.Generator().manual_seed(3))
    turned = model(patches.select([order]))
    torch.testing.assert_close(turned, model(patches)[order], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("completion", COMPLETIONS)
def test_what_completion_makes_of_pruned_tokens(completion: str) -> None:
    """Each ablation reads what it says: the state that a token left with, one vector, or nothing."""
    model, patches = tiny(completion=completion).eval(), pack_of()
    parts = model.encoder(patches).parts
    assert model.assembler is not None

    def assembled(shift: float) -> Tensor:
        moved = [replace(part, x=part.x + shift * torch.randn_like(part.x)) for part in parts[:-1]]
        return model.assembler([*moved, parts[-1]], patches)  # type: ignore[misc]

    out, gone = assembled(0.0), torch.cat([part.rows for part in parts[:-1]])
    assert torch.equal(out, assembled(1.0)) == (completion in ("mask", "last")), "the state at leaving is read"
    if completion == "last":
        assert not out[gone].any()
    if completion in ("none", "cross", "last"):
        assert torch.equal(out[parts[-1].rows], parts[-1].x), "kept tokens pass as they are"


@pytest.mark.parametrize("completion", COMPLETIONS)
def test_every_weight_has_a_use(completion: str) -> None:
    model, patches = tiny(completion=completion), pack_of()
    model(patches).square().sum().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_the_same_noise_makes_the_same_choice() -> None:
    model, patches = tiny(), pack_of()

    def apply(seed: int = 0, scale: float = 1.0) -> Tensor:
        scores: list[Scores] = []
        model(patches, Pruning(noise=torch.Generator().manual_seed(seed), noise_scale=scale, scores=scores))
        return scores[0].kept

    laws.deterministic(apply)
    assert not torch.equal(apply(0), apply(1))
    scores: list[Scores] = []
    model.eval()(patches, Pruning(scores=scores))
    assert torch.equal(apply(0, 0.0), scores[0].kept), "annealed to nothing, training chooses as evaluation does"


def test_random_budgets_serve_one_model() -> None:
    model, patches = tiny().eval(), pack_of()
    for ratio in (0.02, 0.1, 0.5, 1.0):
        assert bool(torch.isfinite(model(patches, Pruning(keep_ratio=ratio))).all())


def score_gradient(estimator: str, num_tokens: int = 1728) -> float:
    """Size of the scorer's gradient beside that of the tokens."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(num_tokens, 32, generator=generator)
    scorer = TokenScorer(32)
    pruned = TokenPruner(scorer, estimator)(x_TD, Packing((num_tokens,)), [num_tokens // 10])
    target = torch.randn(pruned.packing.lengths[0], 32, generator=generator)
    (pruned.apply(x_TD)[0] * target).sum().backward()
    weight = scorer.embed.weight.grad
    assert weight is not None
    return float(weight.norm())


def test_the_scorer_gets_a_gradient() -> None:
    """The published estimator shrinks it with the number of tokens; the threshold does not."""
    torch.manual_seed(0)
    threshold = score_gradient("threshold")
    torch.manual_seed(0)
    assert threshold > 30 * score_gradient("softmax")


class Given(nn.Module):
    """A scorer that says what it was told."""

    def __init__(self, score: Tensor) -> None:
        super().__init__()
        self.score = score

    def forward(self, x_TD: Tensor, packing: Packing) -> Tensor:
        return self.score


def test_pruned_tokens_pull_the_other_way() -> None:
    x_TD = torch.ones(4, 1)
    score = torch.tensor([4.0, 3.0, 2.0, 1.0], requires_grad=True)
    pruned = TokenPruner(Given(score))(x_TD, Packing((4,)), [2])
    kept, gone = pruned.apply(x_TD)
    assert kept.shape == gone.shape == (2, 1)
    (from_kept,) = torch.autograd.grad(kept.sum(), score, retain_graph=True)
    (from_gone,) = torch.autograd.grad(gone.sum(), score)
    assert bool((from_kept >= 0).all())
    assert bool((from_gone <= 0).all())
    assert torch.equal(from_kept[2:], torch.zeros(2))


def test_a_gate_acts_once() -> None:
    """The released code multiplies a first gate again at the later prune points, counting its gradient three times."""
    model, patches = tiny(completion="none"), pack_of()
    scores: list[Scores] = []
    kept = model.encoder(patches, Pruning(scores=scores)).parts[-1].x
    (gradient,) = torch.autograd.grad(kept.sum(), scores[0].score, retain_graph=True, allow_unused=True)
    assert gradient is not None
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("published", [False, True])
def test_scores_do_not_depend_on_company(published: bool) -> None:
    torch.manual_seed(0)
    scorer = TokenScorer(16, published=published)
    x_TD = torch.randn(60, 16)
    together = scorer(x_TD, Packing((20, 40)))
    torch.testing.assert_close(together[:20], scorer(x_TD[:20], Packing((20,))), rtol=1e-5, atol=1e-6)
    assert bool((together <= 0).all()) == published  # the log-sigmoid of the released code saturates at 0


@pytest.mark.parametrize(("width", "changes"), [(16, {"features": 3}), (18, {"published": True})])
def test_impossible_scorers(width: int, changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        TokenScorer(width, **changes)  # type: ignore[arg-type]


ONE_GRAPH = """
import torch
from foveate.nn.attention import Packing
from foveate.nn.pruner import TokenPruner
from foveate.nn.scorer import TokenScorer
pruner, packing, x = TokenPruner(TokenScorer(16)), Packing((40, 24)), torch.randn(64, 16)
step = lambda x: pruner(x, packing, [10, 6]).apply(x)
compiled = torch.compile(step, backend="eager", fullgraph=True)
for a, b in zip(compiled(x), step(x)):
    torch.testing.assert_close(a, b)
with torch.inference_mode():
    for a, b in zip(compiled(x), step(x)):
        torch.testing.assert_close(a, b)
"""


def test_one_graph() -> None:
    """No host synchronisation and no graph break in a prune point, the same path in training and inference.

    In a process of its own, since the checks of shapes in the tests are no part of what is compiled.
    """
    done = subprocess.run([sys.executable, "-c", ONE_GRAPH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_save_and_load(tmp_path: object) -> None:
    model = tiny().eval()
    model.save_pretrained(tmp_path)  # type: ignore[arg-type]
    again = fv.SegmentationModel.from_pretrained(tmp_path).eval()  # type: ignore[arg-type]
    assert torch.equal(again(pack_of()), model(pack_of()))
