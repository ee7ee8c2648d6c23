"""A dense segmenter, ours or another's, turned into its sparse form: exact, undone, taught, refused."""

import copy
import io
import subprocess
import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import foveate as fv
import laws
from foveate.errors import BudgetError, ConfigError, ShapeError
from foveate.nn.adapters import adapt
from foveate.nn.pruner import Pruning
from foveate.tasks.pruning import score_loss
from hosts import DEPTH, NAMES, WIDTH, Grid, Plain, host, monai_unetr

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
COMPLETIONS = ["none", "cross", "block"]


def points(name: str) -> tuple[int, ...]:
    return (2, 5, 8) if name.startswith("unetr") else (0, 2)


def shake(sparsifier: nn.Module) -> None:
    """Fresh maps of zero would hide what completion does."""
    with torch.no_grad():
        for value in sparsifier.parameters():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())) * 0.1)


@pytest.fixture
def sparse(request: pytest.FixtureRequest, timm: ModuleType) -> tuple[nn.Module, Tensor]:
    model, images = host(request.param, timm)
    model = fv.sparsify(model, points(request.param), 0.5)
    shake(model.sparsifier)
    return model, images


plain = pytest.mark.parametrize("sparse", ["torch"], indirect=True)
some = pytest.mark.parametrize("sparse", ["timm", "eva", "vit", "torch"], indirect=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_switch_on_any_vit(timm: ModuleType, name: str) -> None:
    """Neutrality at keep_ratio=1; a checkpoint of the dense model still fits; undone, the model is the dense one."""
    model, images = host(name, timm)
    with torch.no_grad():
        dense, state = model(images), {key: value.clone() for key, value in model.state_dict().items()}
        sparse = fv.sparsify(model, points(name), keep_ratio=0.5)
        assert sparse is model
        found = sparse.load_state_dict(state, strict=False)
        assert not found.unexpected_keys
        assert found.missing_keys
        assert all(key.startswith("sparsifier.") for key in found.missing_keys)
        shake(sparse.sparsifier)
        pruned = sparse(images)
        assert pruned.shape == dense.shape
        assert pruned.isfinite().all()
        assert not torch.allclose(pruned, dense, atol=1e-3)
        sparse.sparsifier.pruning = Pruning(keep_ratio=1.0)
        torch.testing.assert_close(sparse(images), dense, rtol=1e-6, atol=1e-6)
        assert sparse.sparsifier.remove() is model
        assert torch.equal(model(images), dense)
        assert model.state_dict().keys() == state.keys()


@pytest.mark.parametrize("sparse", NAMES, indirect=True)
def test_an_image_has_the_same_answer_in_any_company(sparse: tuple[nn.Module, Tensor]) -> None:
    model, images = sparse
    with torch.no_grad():
        laws.batch_invariance(lambda batch: list(model(torch.stack(batch))), list(images), tolerance=1e-4)


@pytest.mark.parametrize("completion", COMPLETIONS)
def test_completions(timm: ModuleType, completion: str) -> None:
    """Before any training each is neutral at keep_ratio=1; each learns from the output."""
    model, images = host("timm", timm)
    dense = model(images)
    model = fv.sparsify(model, (0, 2), 1.0, completion=completion)
    torch.testing.assert_close(model(images), dense, rtol=1e-6, atol=1e-6)
    shake(model.sparsifier)
    model.sparsifier.pruning = Pruning(keep_ratio=0.5)
    model(images).square().sum().backward()
    assert all(value.grad is not None for value in model.sparsifier.parameters())


def test_pruned_tokens_lie_where_they_were(timm: ModuleType) -> None:
    """Inverse: hooks of the host see full sequences, pruned tokens as they left, kept ones as if they were alone."""
    model, images = host("timm", timm)
    model = fv.sparsify(model, (0, 2), (0.5, 0.25), completion="none")
    seen: list[Tensor] = []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda _module, _args, out: seen.append(out))
    with torch.no_grad(), model.sparsifier.scores() as scores:
        model(images)
    assert [len(stage.rows) for stage in scores] == [128, 64]
    kept = [stage.rows[stage.kept].view(2, -1) % 64 for stage in scores]
    for image in range(2):
        first, second = (set(one[image].tolist()) for one in kept)
        assert second < first
        for place in range(64):
            leaves = 3 if place in second else 2 if place in first else 0
            tokens = [state[image, 1 + place] for state in seen]
            for before, (one, other) in enumerate(pairwise(tokens)):
                assert torch.equal(one, other) == (before >= leaves)
    index = torch.cat([torch.zeros(2, 1, dtype=torch.int64), kept[0] + 1], 1)[..., None].expand(-1, -1, WIDTH)
    block = model.backbone.blocks[1]
    with torch.no_grad():
        alone = type(block).forward(block, seen[0].gather(1, index))
    torch.testing.assert_close(seen[1].gather(1, index), alone)


def padded(model: nn.Module, x: Tensor, valid: Tensor) -> Tensor:
    return model(x, src_key_padding_mask=~valid)


@pytest.mark.parametrize("completion", COMPLETIONS)
def test_padding_is_never_data(completion: str) -> None:
    """Images of different length: each keeps its own share, and padding changes nothing, forward and backward."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 64, dropout=0.0, norm_first=True, batch_first=True)
    model = fv.sparsify(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), (0, 2), 0.5, completion=completion)
    shake(model.sparsifier)
    valid = torch.arange(70)[None] < torch.tensor([70, 41, 20])[:, None]
    x = torch.randn(3, 70, WIDTH)
    laws.padding_is_never_data(lambda x, valid: padded(model, x, valid), x, valid, tolerance=1e-4)
    with torch.no_grad(), model.sparsifier.scores() as scores:
        together = padded(model, x, valid)
        torch.testing.assert_close(together[1, :41], model(x[1:2, :41])[0], rtol=1e-4, atol=1e-4)
    assert [len(stage.kept) for stage in scores[:2]] == [35 + 20 + 16, 18 + 16 + 16]


@some
def test_hidden_states_keep_their_length(sparse: tuple[nn.Module, Tensor]) -> None:
    model, images = sparse
    if hasattr(model.backbone, "forward_intermediates"):
        states = model.backbone.forward_intermediates(images, indices=DEPTH, intermediates_only=True)
        assert {tuple(state.shape) for state in states} == {(2, WIDTH, 8, 8)}
    elif not isinstance(model.backbone, Plain):
        states = model.backbone(images, output_hidden_states=True).hidden_states
        assert {tuple(state.shape) for state in states} == {(2, 65, WIDTH)}


@some
def test_half_precision(sparse: tuple[nn.Module, Tensor]) -> None:
    model, images = sparse
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images)
    out.float().square().mean().backward()
    assert all(
        value.grad is not None and bool(value.grad.isfinite().all())
        for value in model.parameters()
        if value.requires_grad and value.grad is not None
    )
    assert model.sparsifier.pruners[0].scorer.embed.weight.grad is not None
    assert model.to(torch.bfloat16)(images.to(torch.bfloat16)).isfinite().all()


@some
def test_copies_are_their_own(sparse: tuple[nn.Module, Tensor]) -> None:
    model, images = sparse
    again = copy.deepcopy(model)
    expected = model(images)
    assert torch.equal(again(images), expected)
    again.sparsifier.pruning = Pruning(keep_ratio=1.0)
    with torch.no_grad():
        for value in again.parameters():
            value.zero_()
    assert torch.equal(model(images), expected)
    if isinstance(model.backbone, Plain):
        return
    model.tokens = None  # a lambda cannot be pickled, a sparse model can
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    read.tokens = again.tokens
    assert torch.equal(read(images), expected)


class Recomputed(nn.Module):
    """The torch segmenter with activation checkpointing around every block."""

    def __init__(self, model: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Tensor:
        net = self.model.backbone
        x = net.patch(x).flatten(2).transpose(1, 2) + net.place
        for block in net.encoder.layers:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.model.head(x)


def gradients(model: nn.Module, run: nn.Module, images: Tensor, noise: bool, twice: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    model.sparsifier.pruning = Pruning(noise=generator if noise else None)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # DINOv3 turns its positions by chance
    loss = run(images[:1]).square().mean()
    if twice:
        loss = loss + run(images[1:]).square().mean()
    model.sparsifier.pruning = Pruning(keep_ratio=0.9)  # for what comes next, not for what is computed again
    loss.backward()
    return [torch.zeros(()) if value.grad is None else value.grad.clone() for value in model.parameters()]


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@plain
def test_recomputation_makes_the_same_choice(
    sparse: tuple[nn.Module, Tensor], reentrant: bool, twice: bool, noise: bool
) -> None:
    """Activation checkpointing, two forward passes before one backward pass among the cases."""
    model, images = sparse
    expected = gradients(model, lambda x: model.head(model.backbone(x)), images, noise, twice)  # type: ignore[arg-type]
    actual = gradients(model, Recomputed(model, reentrant), images, noise, twice)
    laws.same(actual, expected, "gradients of a recomputed pass", 1e-5)


@plain
def test_recomputation_remembers_the_last_passes(sparse: tuple[nn.Module, Tensor]) -> None:
    model, images = sparse
    run = Recomputed(model, False)
    torch.stack([run(images).mean() for _ in range(16)]).sum().backward()
    with pytest.raises(ShapeError, match="block 3 is computed again for none of the last 16 forward passes; call back"):
        torch.stack([run(images).mean() for _ in range(17)]).sum().backward()


@pytest.mark.parametrize("sparse", ["timm", "eva", "vit", "dinov3"], indirect=True)
def test_recomputation_by_the_hosts(sparse: tuple[nn.Module, Tensor]) -> None:
    model, images = sparse
    model.train()
    expected = gradients(model, model, images, noise=True, twice=True)
    for name in ("set_grad_checkpointing", "gradient_checkpointing_enable"):
        getattr(model.backbone, name, lambda: None)()
    laws.same(gradients(model, model, images, noise=True, twice=True), expected, "gradients", 1e-5)


ONE_GRAPH = """
import sys
sys.path.insert(0, "tests")
import torch
import foveate as fv
from foveate.nn.pruner import Pruning
from hosts import host
from torchvision_stand_in import import_timm
for name in ("torch", "eva"):
    torch._dynamo.reset()
    model, images = host(name, import_timm())
    model = fv.sparsify(model, (0, 2), 0.5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.sparsifier.pruning = Pruning(keep_ratio=0.75)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-4)
    compiled(images).square().mean().backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    model(images).square().mean().backward()
    for name, value in model.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(found[name], value.grad, rtol=1e-3, atol=1e-4)
"""


@pytest.mark.slow
def test_one_graph() -> None:
    """No graph break where the host has none; in a process of its own, without the checks of shapes."""
    done = subprocess.run([sys.executable, "-c", ONE_GRAPH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def ours(**changes: object) -> fv.SegmentationModel:
    torch.manual_seed(0)
    settings = {"width": 16, "depth": 4, "num_heads": 2, "patch_size": 4, "pos_grid": 4, "decoder_width": 4}
    return fv.create_model("apf_vit_tiny", in_chans=2, num_classes=3, **{**settings, **changes}).eval()  # type: ignore[arg-type]


def leaves_of(seed: int = 0) -> fv.Patches:
    image = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(seed))
    return fv.patchify(image, fv.adaptive_leaves(image, max_leaves=100, min_size=4), 4)


@pytest.mark.parametrize("decoder", [None, "sparse", "linear"])
@pytest.mark.parametrize("completion", ["none", "cross", "block", "mask"])
def test_ours(completion: str, decoder: str | None) -> None:
    dense, patches = ours(), leaves_of()
    before = dense.state_dict()
    model = fv.sparsify(dense, (0, 2), 0.5, completion=completion, decoder=decoder)
    assert not dense.config.prune_after
    assert model.config.prune_after == (0, 2)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if key.startswith("encoder."))
    assert model(patches).shape == dense(patches).shape
    if completion in ("none", "cross") and decoder is None:
        torch.testing.assert_close(model(patches, Pruning(keep_ratio=1.0)), dense(patches), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert all(torch.equal(dense.state_dict()[key], value) for key, value in before.items())


def test_ours_around_another_encoder() -> None:
    """An adapted encoder runs image by image; its blocks are the other's."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 64, dropout=0.0, batch_first=True)
    encoder = adapt(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), in_chans=2, patch_size=4).eval()
    patches = fv.pack([leaves_of(0), leaves_of(1)])
    dense = encoder(patches).hidden[-1]
    sparse = fv.sparsify(encoder, (0, 2), 0.5)
    assert not torch.allclose(sparse(patches).hidden[-1], dense, atol=1e-3)
    sparse.sparsifier.pruning = Pruning(keep_ratio=1.0)
    torch.testing.assert_close(sparse(patches).hidden[-1], dense, rtol=1e-6, atol=1e-6)


def drawn(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with one bright square each, and its mask."""
    generator = torch.Generator().manual_seed(seed)
    images, masks = torch.randn(num, 3, 32, 32, generator=generator) * 0.3, torch.zeros(num, 32, 32, dtype=torch.int64)
    for image, mask in zip(images, masks, strict=True):
        y, x = torch.randint(2, 20, (2,), generator=generator).tolist()
        image[:, y : y + 9, x : x + 9] += 1.5
        mask[y : y + 9, x : x + 9] = 1
    return images, masks


def worth_of(masks: Tensor) -> Tensor:
    """1 with an edge in the token, 1/2 inside, 0 in background."""
    share = masks.float().unfold(1, 4, 4).unfold(2, 4, 4).mean((-1, -2)).flatten()
    return torch.where((share > 0) & (share < 1), 1.0, 0.5 * (share == 1))


def fit(model: nn.Module, steps: int) -> float:
    """Fit a few steps; returns the loss on other images."""
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(steps):
        images, masks = drawn(8, step)
        if hasattr(model, "sparsifier"):
            with model.sparsifier.scores() as scores:
                logits = model(images)
            loss = nn.functional.cross_entropy(logits, masks) + 0.1 * score_loss(scores, worth_of(masks), [64] * 8)
        else:
            loss = nn.functional.cross_entropy(model(images), masks)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return held_out(model)


def held_out(model: nn.Module) -> float:
    images, masks = drawn(32, 1000)
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(images), masks))


def test_fine_tuning_brings_a_sparse_model_near_the_dense_one() -> None:
    torch.manual_seed(0)
    model: nn.Module = Grid(Plain(), lambda net, x: net(x))
    start, dense = held_out(model), fit(model, 50)
    assert dense < 0.3 * start
    model = fv.sparsify(model, (0, 2), 0.5)
    switched, tuned = held_out(model), fit(model, 30)
    assert switched > tuned
    assert tuned < dense + 0.05 * start
    images, masks = drawn(32, 1000)
    with torch.no_grad(), model.sparsifier.scores() as scores:
        model(images)
    worth = worth_of(masks)
    kept = torch.zeros_like(worth).index_fill(0, scores[0].rows[scores[0].kept], 1.0)
    assert kept[worth == 1].mean() > 0.95, "tokens with an edge are kept"


class Merging(nn.Module):
    """Halves the tokens behind each block."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 64, batch_first=True)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)[:, ::2]
        return x


class Alone(nn.Module):
    """A stack that starts with its second block."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, 2, 64, batch_first=True), 4, enable_nested_tensor=False
        ).layers

    def forward(self, x: Tensor) -> Tensor:
        for block in list(self.layers)[1:]:
            x = block(x)
        return x


class Bare(nn.Module):
    """Blocks whose norms lie elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": nn.Linear(4, 4)}) for _ in range(4))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Plain(), Plain()


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (nn.Conv2d(1, 1, 1), {}, "Conv2d has no stack of transformer blocks that sparsify.. finds; give its path"),
        (Plain(), {"blocks": "vit.blocks"}, r"blocks='vit.blocks' is no stack of blocks in Plain; .*'encoder.layers'"),
        (Plain(), {"blocks": "patch"}, "blocks='patch' is no stack of blocks in Plain"),
        (Bare(), {}, "the blocks in 'blocks' have no norm of their own that tells the width; give another path"),
        (Two(), {}, "several stacks of blocks: 'encoder.encoder.layers', 'decoder.encoder.layers'; choose"),
        (Plain(), {"prune_after": (0, 3)}, r"prune_after=\(0, 3\) must ascend within 0..2, before the last of the 4"),
        (Plain(), {"prune_after": ()}, "must ascend within"),
        (Plain(), {"decoder": "sparse"}, "decoder='sparse': Plain keeps its own decoder; leave it out"),
        (Plain(), {"completion": "mask"}, "completion='mask' is none of cross, none, block; choose one"),
        (Plain(), {"scorer": "big"}, "scorer='big' is none of light, published; choose one"),
        (Plain(), {"estimator": "magic"}, "estimator='magic'"),
        (ours(prune_after=(1,), keep_ratio=0.5), {}, r"prunes behind \(1,\) already; .* start from the dense"),
        (ours(), {"prune_after": (3,)}, r"prune_after=\(3,\) must ascend within 0..2"),
    ],
)  # fmt: skip
def test_what_cannot_be_switched(model: nn.Module, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fv.sparsify(model, **{"prune_after": (0, 2), **changes})  # type: ignore[arg-type]
    assert not hasattr(model, "sparsifier")


@pytest.mark.parametrize("ratio", [0.0, 1.5, (0.25, 0.5), (0.5,)])
def test_impossible_ratios(ratio: float | tuple[float, ...]) -> None:
    for model in (Plain(), ours()):
        with pytest.raises(BudgetError, match="keep_ratio="):
            fv.sparsify(model, (0, 2), ratio)


@plain
def test_impossible_ratios_at_run_time(sparse: tuple[nn.Module, Tensor]) -> None:
    model, images = sparse
    for ratio in (0.0, 2.0, (0.5,)):
        model.sparsifier.pruning = Pruning(keep_ratio=ratio)
        with pytest.raises(BudgetError, match="keep_ratio="):
            model(images)


@plain
def test_a_sparse_model_is_not_switched_again(sparse: tuple[nn.Module, Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"is sparse already; set model.sparsifier.pruning, or call"):
        fv.sparsify(sparse[0], (0, 2))


def test_windows_are_refused(timm: ModuleType) -> None:
    import transformers
    from monai.networks.nets import SwinUNETR

    numbers = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32, "patch_size": 4}
    stages = {"window_size": 4, "depths": (2, 2), "num_heads": (1, 2), "embed_dim": 8}
    for model in (
        timm.models.swin_transformer.SwinTransformer(img_size=32, patch_size=2, **stages),
        SwinUNETR(in_channels=1, out_channels=2, feature_size=12),
        transformers.SwinModel(transformers.SwinConfig(image_size=32, **stages)),
        transformers.VitDetModel(transformers.VitDetConfig(**numbers, window_block_indices=[0, 1], window_size=4)),
        transformers.BeitModel(
            transformers.BeitConfig(**numbers, intermediate_size=32, use_relative_position_bias=True)
        ),
    ):
        with pytest.raises(ConfigError, match="attends within windows or by relative place"):
            fv.sparsify(model, (0,))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Merging(), "block 1 got 32 tokens where block 0 got 64; pruning needs a model that keeps the number"),
        (Alone(), "block 1 ran before block 0; pruning needs the blocks in their order"),
    ],
)
def test_models_that_run_otherwise(model: nn.Module, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        fv.sparsify(model, (0, 2), 0.5)(torch.randn(2, 64, WIDTH))


@plain
def test_what_cannot_be_cut(sparse: tuple[nn.Module, Tensor]) -> None:
    encoder, x = sparse[0].backbone.encoder, torch.randn(2, 64, WIDTH)
    with pytest.raises(ConfigError, match=r"block 1 takes src_mask of shape \(64, 64\), which pruning cannot cut"):
        encoder(x, mask=torch.zeros(64, 64))
    block = encoder.layers[0]
    with pytest.raises(ShapeError, match="block 0 got 2 axes, and pruning needs"):
        block(x[0])
    with pytest.raises(ShapeError, match="block 0 got nested tokens"):
        block(torch.nested.nested_tensor([x[0], x[1, :9]], layout=torch.jagged))


def test_prefix_tokens_can_be_told(timm: ModuleType) -> None:
    model, images = host("timm", timm)
    assert fv.sparsify(model, (0, 2), num_prefix=5).sparsifier.num_prefix == 5
    model(images)
    model.sparsifier.remove()
    model = fv.sparsify(model, (0, 2), num_prefix=65)
    with pytest.raises(
        ShapeError, match="2 images of 65 tokens, 65 of them prefix tokens, leave none to prune; give im"
    ):
        model(images)
    with pytest.raises(ShapeError, match="0 images of 65 tokens"):
        model(images[:0])


def test_a_path_chooses_among_stacks() -> None:
    model = fv.sparsify(Two(), (0, 2), 0.5, blocks="decoder.encoder.layers")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), model.sparsifier.scores() as scores:
        model.encoder(x)
        assert not scores
        model.decoder(x)
    assert len(scores) == 2


def test_monai_in_training() -> None:
    """A whole step of MONAI's UNETR, its decoder untouched, on the tensors that MONAI's loaders give."""
    from monai.data import MetaTensor

    model = fv.sparsify(monai_unetr(2), (2, 5, 8), (0.75, 0.6, 0.5)).train()
    with model.sparsifier.scores() as scores:
        logits = model(MetaTensor(torch.randn(2, 1, 96, 96)))
    assert [len(stage.kept) for stage in scores] == [54, 44, 36]
    (logits.square().mean() + score_loss(scores, torch.rand(72).round(), [36, 36])).backward()
    assert all(value.grad is not None for value in model.sparsifier.pruners.parameters())


def test_lists_and_one_point_are_as_good_as_tuples() -> None:
    model = fv.sparsify(monai_unetr(2), prune_after=[2, 5], keep_ratio=[0.5, 0.25])
    assert (model.sparsifier.prune_after, model.sparsifier.keep_ratio) == ((2, 5), (0.5, 0.25))
    model = fv.sparsify(model.sparsifier.remove(), prune_after=2, keep_ratio=[0.5])
    assert model.sparsifier.prune_after == (2,)
    ours = fv.create_model("apf_vit_tiny", width=24, depth=4, num_heads=2, patch_size=4)
    assert fv.sparsify(ours, prune_after=[0, 1], keep_ratio=0.5).config.prune_after == (0, 1)
