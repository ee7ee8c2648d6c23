"""What the released code of soft top-k token pruning gets wrong, one test for each defect that could come back here."""

import ast
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pruning import Given, pack_of, score_gradient, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import foveate as fv
from foveate.geometry.soft_estimators import ESTIMATORS
from foveate.nn.attention import Packing
from foveate.nn.pruner import Pruning, Scores, TokenPruner, keep_counts
from foveate.nn.scorer import TokenScorer
from foveate.tasks.loop import make_optimizer
from foveate.tasks.settings import TrainConfig

SOURCE = Path(fv.__file__).parent


def test_keep_counts_are_exact() -> None:
    """Released: int(1000 * (1 - 0.9)) is 99, int(10 * (1 - 0.9)) is 0."""
    assert keep_counts(1000, 0.1, 1) == (100,)
    for length in range(160, 2000, 10):
        assert keep_counts(length, 0.1, 1) == (length // 10,)


def test_no_collapse() -> None:
    """Released: 1,728 tokens become 172, 17 and 1; 216 become 21, 2 and none but the class token."""
    for length in (1, 5, 27, 216, 1728, 32768):
        counts = keep_counts(length, 0.1, 3)
        assert min(counts) >= min(length, 16)
        assert sorted(counts, reverse=True) == list(counts)


def test_few_tokens_are_no_crash() -> None:
    """Released: a volume of 48 voxels a side at patch 16 ends with "cannot reshape tensor of 0 elements"."""
    settings = {"patch_size": 16, "width": 24, "depth": 4, "num_heads": 2, "prune_after": (0, 1, 2), "keep_ratio": 0.1}
    model = fv.create_model("scd_vit_tiny_3d", num_classes=2, **settings).eval()  # type: ignore[arg-type]
    image = torch.randn(1, 48, 48, 48, generator=torch.Generator().manual_seed(0))
    patches = fv.patchify(image, fv.uniform_leaves((48,) * 3, 16), 16)
    scores: list[Scores] = []
    assert model(patches, Pruning(scores=scores)).shape == (27, 2, 16, 16, 16)
    assert [len(stage.kept) for stage in scores] == [16, 16, 16]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_variant_can_be_built_and_trained(estimator: str) -> None:
    """Released: the second encoder raises TypeError when it is built, and refuses to train."""
    model = tiny(estimator=estimator, scorer="published", completion="block")
    model(pack_of()).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


def test_scores_of_no_number_are_no_trap() -> None:
    """Released: a NaN among the scores starts a debugger inside training."""
    score = torch.tensor([1.0, float("nan"), 3.0, 2.0])
    pruned = TokenPruner(Given(score))(torch.ones(4, 2), Packing((4,)), [3])
    assert pruned.split.kept[0].tolist() == [0, 2, 3]


def test_inference_builds_no_graph() -> None:
    """Released: its inference benchmark keeps what a backward pass would need."""
    saved: list[Tensor] = []
    model = tiny()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        mask = model.segment(torch.randn(2, 32, 32), max_leaves=40, min_size=4)
    assert not saved
    assert not mask.requires_grad


def test_codes_norms_and_biases_are_not_decayed() -> None:
    """Released: class token, positions and the codes of the stages are decayed in the sparse model only."""
    model = tiny(num_registers=1)
    groups = make_optimizer(model, TrainConfig(weight_decay=0.1)).param_groups
    decayed = {id(weight) for group in groups if group["weight_decay"] for weight in group["params"]}
    spared = {name for name, weight in model.named_parameters() if id(weight) not in decayed}
    assert {"encoder.cls_token", "encoder.reg_token", "encoder.pos_embed"} <= spared
    for name, weight in model.named_parameters():
        if name.endswith("bias") or weight.ndim < 2 or "norm" in name:
            assert name in spared
        if "scorer" in name and weight.ndim == 2:
            assert id(weight) in decayed, "score networks are trained like everything else"
    together = [id(weight) for group in groups for weight in group["params"]]
    assert sorted(together) == sorted(id(weight) for weight in model.parameters())


def test_the_decoder_reads_several_depths() -> None:
    """Released: the sparse model feeds one tensor to all twelve branches of the decoder, the dense one does not."""
    model, patches = tiny(), pack_of()
    hidden = model.encoder(patches).hidden
    assert len(hidden) == 4
    assert all(not torch.equal(a, b) for a, b in pairwise(hidden))


def test_the_gradient_of_the_scores_does_not_vanish() -> None:
    """Released: a softmax over 1,728 tokens leaves the score network 1e-7 of gradient, the blocks have 1e-2."""
    torch.manual_seed(0)
    threshold = score_gradient("threshold")
    torch.manual_seed(0)
    assert threshold >= 50 * score_gradient("softmax")


def test_training_ends_with_the_choice_of_evaluation() -> None:
    """Released: noise never ends, so that training chooses other tokens than evaluation does."""
    model, patches = tiny(), pack_of()

    def kept(pruning: dict[str, Any]) -> list[Tensor]:
        scores: list[Scores] = []
        model(patches, Pruning(scores=scores, **pruning))
        return [stage.rows[stage.kept] for stage in scores]

    noisy = kept({"noise": torch.Generator().manual_seed(0)})
    annealed = kept({"noise": torch.Generator().manual_seed(0), "noise_scale": 0.0})
    model.eval()
    assert all(torch.equal(a, b) for a, b in zip(annealed, kept({}), strict=True))
    assert not torch.equal(noisy[0], annealed[0])


def test_scores_do_not_saturate() -> None:
    """Released: every score is the logarithm of a sigmoid, so that confident tokens are all 0 and have no rank."""
    scorer, released = TokenScorer(8), TokenScorer(8, published=True)
    with torch.no_grad():
        for network in (scorer, released):
            network.head[-1].bias.fill_(200.0)
    x_TD = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert len(scorer(x_TD, Packing((50,))).unique()) > 25
    assert len(released(x_TD, Packing((50,))).unique()) == 1


@pytest.mark.parametrize("estimator", ["threshold", "softmax", "lapsum"])
def test_a_gate_acts_once(estimator: str) -> None:
    """Released: the gate of the first prune point multiplies tokens again at the others; its gradient counts thrice."""
    x_TD = torch.ones(12, 1)
    first = torch.arange(12.0).requires_grad_()
    one = TokenPruner(Given(first), estimator)(x_TD, Packing((12,)), [8])
    kept = one.apply(x_TD)[0]
    second = torch.arange(8.0, 0.0, -1.0).requires_grad_()
    two = TokenPruner(Given(second), estimator)(kept, Packing((8,)), [4])
    (through,) = torch.autograd.grad(two.apply(kept)[0].sum(), first, retain_graph=True)
    rest = two.split.kept[0]
    (once,) = torch.autograd.grad(kept[rest].sum(), first)
    torch.testing.assert_close(through, once)


@pytest.mark.parametrize("gate_pruned", [True, False])
def test_the_gate_of_pruned_tokens_is_a_switch(gate_pruned: bool) -> None:
    """Released: pruned tokens always carry 1 - gate, so that what they are good for lowers their score."""
    x_TD = torch.ones(6, 1)
    score = torch.arange(6.0).requires_grad_()
    pruned = TokenPruner(Given(score), gate_pruned=gate_pruned)(x_TD, Packing((6,)), [3])
    kept, gone = pruned.apply(x_TD)
    assert torch.equal(gone, x_TD[:3])
    (from_kept,) = torch.autograd.grad(kept.sum(), score, retain_graph=True)
    assert bool((from_kept[3:] > 0).all())
    assert gone.requires_grad == gate_pruned
    if gate_pruned:
        (from_gone,) = torch.autograd.grad(gone.sum(), score)
        assert bool((from_gone[:3] < 0).all())
    model = tiny(gate_pruned=gate_pruned)
    assert all(pruner.gate_pruned == gate_pruned for pruner in model.encoder.pruners.values())  # type: ignore[union-attr]


class HostReads(TorchDispatchMode):
    """Names of the operators that make a device wait for the host or the other way round, and boolean indices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        waits = name in {"nonzero", "_local_scalar_dense", "masked_select", "item", "unique", "_unique2", "is_nonzero"}
        if name in {"index", "index_put", "index_put_"}:
            waits = any(part is not None and part.dtype in (torch.bool, torch.uint8) for part in args[1])
        self.seen += [name] if waits else []
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("completion", ["cross", "block"])
def test_nothing_waits_for_the_device(completion: str) -> None:
    """Released: ten synchronisations at every prune point, and two for every list entry in assembly."""
    model, patches = tiny(completion=completion, rope=True), fv.pack([pack_of(), pack_of(seed=1)])
    assert model.assembler is not None
    x_TD, angles = model.encoder.embed(patches)  # type: ignore[operator]
    code = model.assembler.geometry_embed
    assert code is not None
    code_TD = code(patches)
    model.assembler.geometry_embed = None
    model.assembler.register_module("geometry_embed", Constant(code_TD))
    with HostReads() as reads:
        out = model.encoder.run_blocks(x_TD, angles, patches.lengths, Pruning(scores=[]))  # type: ignore[operator]
        model.assembler(out.parts, patches).square().sum().backward()
    assert reads.seen == []


class Constant(torch.nn.Module):
    """What stands in for a module whose host-side work is done."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, patches: fv.Patches) -> Tensor:
        return self.value


ONE_GRAPH = """
import torch
import foveate as fv
model = fv.create_model("scd_vit_tiny", in_chans=2, num_classes=3, width=16, depth=3, num_heads=2, patch_size=4,
    pos_grid=4, decoder_width=4, prune_after=(0, 1), keep_ratio=(0.5, 0.25))
image = torch.randn(2, 64, 64)
one = fv.patchify(image, fv.adaptive_leaves(image, max_leaves=100, min_size=4), 4)
patches = fv.pack([one, one])
x, angles = model.encoder.embed(patches)
def run(x):
    out = model.encoder.run_blocks(x, angles, patches.lengths)
    return *out.hidden, *(part.x for part in out.parts), *(part.rows for part in out.parts)
compiled = torch.compile(run, backend="eager", fullgraph=True)
for mode in (torch.enable_grad, torch.inference_mode):
    with mode():
        for a, b in zip(compiled(x), run(x), strict=True):
            torch.testing.assert_close(a, b)
"""


def test_the_blocks_with_their_prune_points_are_one_graph() -> None:
    """Released: boolean indices and asserts on tensors break the graph at every prune point.

    In a process of its own, since the checks of shapes in the tests are no part of what is compiled.
    """
    done = subprocess.run([sys.executable, "-c", ONE_GRAPH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_weights_do_not_depend_on_the_size_of_the_image() -> None:
    """Released: positions of the assembler are parameters, so that a checkpoint belongs to one grid."""
    model = tiny()
    before = {name: value.shape for name, value in model.state_dict().items()}
    for side in (16, 64, 128):
        model(pack_of(side=side))
    assert {name: value.shape for name, value in model.state_dict().items()} == before
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("name", ["scd_vit_tiny", "scd_vit_tiny_3d"])
@pytest.mark.parametrize("width", [16, 20])
def test_planes_and_volumes_of_any_size_and_width(name: str, width: int) -> None:
    """Released: "Do not support 2D"; one input size; a width that 6 does not divide is refused."""
    shape = (50, 37) if name == "scd_vit_tiny" else (19, 24, 13)
    image = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    patches = fv.patchify(image, fv.adaptive_leaves(image, max_leaves=60, min_size=4), 4)
    assert bool(tiny(name, width=width)(patches).isfinite().all())


@pytest.mark.parametrize("decoder", ["unetr", "sparse", "token", "linear"])
@pytest.mark.parametrize("patch_size", [4, 8])
def test_every_decoder_takes_every_patch_size(decoder: str, patch_size: int) -> None:
    """Released: the decoder for patches of 4 raises "Expected size 64 but got size 32"."""
    model = tiny(decoder=decoder, patch_size=patch_size)
    image = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    patches = fv.patchify(image, fv.uniform_leaves((64, 64), patch_size), patch_size)
    assert model(patches).shape[2:] == (patch_size, patch_size)


def test_no_device_and_no_extra_is_named() -> None:
    """Released: ``.cuda()`` in the noise; timm, torchvision, wandb and sklearn at the top of modules."""
    extras = {"timm", "torchvision", "wandb", "sklearn", "torchprofile", "requests", "transformers"}
    for path in [*(SOURCE / "nn").glob("*.py"), *(SOURCE / "geometry").glob("*.py"), *(SOURCE / "models").glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {
            node.func.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        assert "cuda" not in called, path.name
        for node in tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & extras, path.name


def test_a_seed_decides_everything() -> None:
    """Released: numpy is not seeded and the noise is drawn from the global generator."""
    runs = []
    for junk in (1, 2):
        model, patches = tiny(), pack_of()
        torch.manual_seed(junk)
        out = model(patches, Pruning(noise=torch.Generator().manual_seed(7)))
        out.square().sum().backward()
        runs.append([out.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_attention_is_never_a_square() -> None:
    """Released: naive attention keeps 12 L^2 numbers a block, 51.5 GB for 32,769 tokens."""
    model = tiny(patch_size=2, width=8, num_heads=1)
    image = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    patches = fv.patchify(image, fv.uniform_leaves((64, 64), 2), 2)
    length, largest = len(patches.pixels), [0]

    def note(x: Tensor) -> Tensor:
        largest[0] = max(largest[0], x.untyped_storage().nbytes() // x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = model.encoder(patches, Pruning(keep_ratio=1.0))
    assert out.hidden[-1].requires_grad
    assert largest[0] < length * length / 8


def test_every_decoder_runs_in_half_precision_on_the_cpu() -> None:
    """Released: its pooling has no bfloat16 kernel on the CPU."""
    for decoder in ("unetr", "sparse", "token"):
        model = tiny("scd_vit_tiny_3d", decoder=decoder)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(pack_of(3))
        out.float().square().mean().backward()
        assert bool(out.isfinite().all())
