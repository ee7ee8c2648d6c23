"""What tokens are worth, the loss that teaches it to the scores, and the recall that judges them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import tiny_config, write_discs
from torch import Tensor

import foveate as fv
from foveate.errors import ConfigError
from foveate.nn.pruner import Pruning, Scores
from foveate.tasks.config import load_config
from foveate.tasks.losses import leaf_loss
from foveate.tasks.pruning import class_shares, draw_pruning, score_loss, selection_recall, token_worth
from foveate.tasks.run import find_model
from foveate.tasks.score_targets import Teacher, loss_worth
from foveate.tasks.segmentation import build_task, fit
from foveate.tasks.settings import TrainConfig

PRUNING: dict[str, Any] = {"prune_after": (0,), "keep_ratio": 0.25, "decoder": "linear"}
TINY: dict[str, Any] = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "pos_grid": 4, "decoder_width": 4}


def scores_of(score: Tensor) -> Scores:
    return Scores(torch.arange(len(score)), score, torch.arange(1), torch.zeros(len(score), 2))


def test_an_edge_is_worth_most_and_background_nothing() -> None:
    labels = torch.zeros(8, 8, dtype=torch.uint8)
    labels[:4, 2:] = 1  # an edge in the first leaf, class 1 alone in the second, background in the third
    labels[4:, 4:] = 255
    soft, weight = fv.patchify_mask(labels, fv.uniform_leaves((8, 8), 4), 4, 2)
    assert token_worth(soft, weight).tolist() == [1.0, 0.5, 0.0, -1.0]


def test_few_tokens_of_worth_count_as_much_as_the_rest() -> None:
    worth = torch.tensor([1.0] + [0.0] * 9 + [-1.0] * 5)
    score = torch.zeros(15, requires_grad=True)
    loss = score_loss([scores_of(score)], worth, [15])
    (gradient,) = torch.autograd.grad(loss, score)
    assert float(loss.detach()) == pytest.approx(math.log(2), rel=1e-6)
    assert float(gradient[0]) == pytest.approx(-float(gradient[1:10].sum()), rel=1e-6)
    assert not gradient[10:].any(), "unlabelled tokens teach nothing"


def test_the_loss_is_a_sum_over_images() -> None:
    generator = torch.Generator().manual_seed(0)
    score, worth = torch.randn(30, generator=generator), (torch.rand(30, generator=generator) > 0.7).float()
    whole = score_loss([scores_of(score)], worth, [10, 20])
    parts = [
        score_loss([scores_of(score[part])], worth[part], [len(score[part])]) for part in (slice(10), slice(10, 30))
    ]
    torch.testing.assert_close(whole, parts[0] + parts[1])


def test_recall_counts_edges_and_classes() -> None:
    worth = torch.tensor([1.0, 1.0, 0.5, 0.5, 0.0, -1.0])
    rows = torch.tensor([0, 2, 3, 5])  # the first prune point left these four
    first = Scores(torch.arange(6), torch.zeros(6), rows, torch.zeros(6, 2))
    recall = selection_recall([first, Scores(rows, torch.zeros(4), torch.tensor([0, 1, 2]), torch.zeros(4, 2))], worth)
    assert recall == {"boundary_recall": 0.5, "foreground_recall": 0.75, "boundary_recall_ceiling": 1.0}
    one = selection_recall([scores_of(torch.zeros(6))], worth)
    assert one["boundary_recall_ceiling"] == 0.5, "one token holds one of two edges at best"
    nothing = selection_recall([first], torch.zeros(6))
    assert math.isnan(nothing["boundary_recall"])
    assert math.isnan(nothing["boundary_recall_ceiling"])


def test_pruning_is_drawn_from_seed_epoch_and_images() -> None:
    train = TrainConfig(keep_ratio=(0.1, 1.0), prune_noise=1.0, epochs=11)
    first, again = draw_pruning(train, 5, ["a", "b"]), draw_pruning(train, 5, ["a", "b"])
    assert first.keep_ratio == again.keep_ratio
    assert isinstance(first.keep_ratio, float)
    assert 0.1 <= first.keep_ratio <= 1.0
    assert first.noise_scale == 0.5
    assert draw_pruning(train, 10, ["a"]).noise_scale == 0.0
    assert draw_pruning(train, 6, ["a", "b"]).keep_ratio != first.keep_ratio
    plain = draw_pruning(TrainConfig(), 0, ["a"])
    assert plain.keep_ratio is None
    assert plain.noise is None


@pytest.mark.parametrize("ratios", [(0.0, 1.0), (0.5, 0.1), (0.5, 1.5)])
def test_impossible_ranges(ratios: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match=r"train.keep_ratio=.* is no range of shares: give the least"):
        TrainConfig(keep_ratio=ratios)


def disc(seed: int) -> tuple[fv.Patches, Tensor, Tensor]:
    """A bright disc, which is labelled, and three dark ones, which are not, in noise; uniform leaves."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    image, labels = 0.3 * torch.randn(1, 64, 64, generator=generator), torch.zeros(64, 64, dtype=torch.uint8)
    for number in range(4):
        y, x = (torch.rand(2, generator=generator) * 44 + 10).tolist()
        inside = (rows - y) ** 2 + (columns - x) ** 2 < 49
        image[0, inside] = 1.0 if number == 3 else -1.0
        labels[inside] = int(number == 3)
    leaves = fv.uniform_leaves((64, 64), 4)
    return fv.patchify(image, leaves, 4), *fv.patchify_mask(labels, leaves, 4, 2)


def lesson(target: str, steps: int = 40) -> dict[str, float]:
    """Recall on images that were not seen, after the scores were taught a target."""
    torch.manual_seed(0)
    model = fv.create_model("scd_vit_tiny", in_chans=1, num_classes=2, **PRUNING, **TINY)  # type: ignore[arg-type]
    teacher = Teacher(32, 2, 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *teacher.parameters()], lr=2e-3)
    for step in range(steps):
        images = [disc(4 * step + number) for number in range(4)]
        patches = fv.pack([image[0] for image in images])
        soft, weight = (torch.cat([image[part] for image in images]) for part in (1, 2))
        scores: list[Scores] = []
        logits = model(patches, Pruning(scores=scores))
        loss = leaf_loss(logits, soft, weight, lengths=patches.lengths).total()
        worth = token_worth(soft, weight)
        if target == "loss":
            worth = loss_worth(logits, soft, weight, patches.lengths)
        if target == "head":
            (worth,), taught = teacher(scores, class_shares(soft, weight), worth >= 0, patches.lengths)
            loss = loss + taught
        optimizer.zero_grad()
        (loss + score_loss(scores, worth, patches.lengths)).backward()
        optimizer.step()
    recalls = []
    for seed in range(1000, 1008):
        patches, soft, weight = disc(seed)
        scores = []
        model.eval().encoder(patches, Pruning(scores=scores))
        recalls.append(selection_recall(scores, token_worth(soft, weight)))
    return {name: sum(recall[name] for recall in recalls) / len(recalls) for name in recalls[0]}


@pytest.mark.parametrize(("target", "least"), [("labels", 0.9), ("loss", 0.85), ("head", 0.75)])
def test_the_scorer_learns_where_the_edges_are(target: str, least: float) -> None:
    """A quarter of the tokens holds most label edges of images that were not seen; by chance it would be a quarter."""
    assert lesson(target)["boundary_recall"] > least


def test_loss_worth_marks_what_adds_most() -> None:
    logits = torch.zeros(4, 2, 1, 1)
    logits[:, 0] = torch.tensor([9.0, 9.0, -9.0, -9.0])[:, None, None]
    soft = torch.tensor([1.0, 0.0])[None, :, None, None].expand(4, 2, 1, 1)  # background everywhere
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None, None]
    assert loss_worth(logits, soft, weight, [4]).tolist() == [0.0, 0.0, 1.0, -1.0]
    assert loss_worth(logits, soft, weight, [2, 2]).tolist() == [0.0, 0.0, 0.0, -1.0], "each image by its own mean"


def test_a_teacher_touches_nothing_but_itself() -> None:
    patches, soft, weight = disc(0)
    model = fv.create_model("scd_vit_tiny", in_chans=1, num_classes=2, **PRUNING, **TINY)  # type: ignore[arg-type]
    teacher, scores = Teacher(32, 2, 1), list[Scores]()
    model.encoder(patches, Pruning(scores=scores))
    worths, loss = teacher(scores, class_shares(soft, weight), token_worth(soft, weight) >= 0, patches.lengths)
    loss.backward()
    assert all(value.grad is None for value in model.parameters())
    assert all(value.grad is not None for value in teacher.parameters())
    assert not worths[0].requires_grad
    assert 0 <= float(worths[0].min()) <= float(worths[0].max()) <= 1


def test_a_teacher_is_kept_for_training_and_left_out_for_inference(tmp_path: Path) -> None:
    """Stopped and resumed, a run is the one that did not stop; its model is one without a teacher."""
    overrides = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "prune_after": [0], "keep_ratio": 0.5}
    root = write_discs(tmp_path / "data")

    def run(name: str, epochs: int, *, resume: bool = False) -> Path:
        train = {"score_target": "head", "epochs": epochs, "schedule": "constant", "warmup": 0.0}
        model = {"name": "scd_vit_tiny", "overrides": overrides}
        return fit(tiny_config(root, tmp_path / name, model=model, train=train), resume=resume).folder

    whole = run("a", 2)
    run("b", 1)
    parts = run("b", 2, resume=True)
    states = [load_file(folder / "checkpoints" / "last" / "model.safetensors") for folder in (whole, parts)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not [name for name in states[0] if "teacher" in name]
    fv.SegmentationModel.from_pretrained(find_model(whole))


def test_a_model_that_prunes_is_trained_like_any_other(tmp_path: Path) -> None:
    overrides = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "prune_after": [0], "keep_ratio": 0.5}
    changes = {
        "model": {"name": "scd_vit_tiny", "overrides": overrides},
        "train": {"keep_ratio": [0.3, 1.0], "prune_noise": 1.0},
    }
    runs = []
    for name in ("a", "b"):
        run = fit(tiny_config(write_discs(tmp_path / "data"), tmp_path / name, **changes)).folder
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        recalls = [line["boundary_recall"] for line in lines if "boundary_recall" in line]
        assert recalls
        assert all(0 <= recall <= 1 for recall in recalls)
        assert all("boundary_recall_ceiling" in line for line in lines if "boundary_recall" in line)
        runs.append([line["score_loss"] for line in lines if "score_loss" in line])
    assert runs[0]
    assert runs[0] == runs[1], "the same seed draws the same budgets and the same noise"


def test_validation_encodes_an_image_once(tmp_path: Path) -> None:
    """The recall comes from the pass that is scored."""
    overrides = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "prune_after": [0], "keep_ratio": 0.5}
    model = {"name": "scd_vit_tiny", "overrides": overrides}
    task = build_task(tiny_config(write_discs(tmp_path / "data"), tmp_path / "run", model=model))
    calls: list[int] = []
    task.model.encoder.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    assert 0 <= task.validate(task.model.eval())["boundary_recall"] <= 1
    assert task.val is not None
    assert len(calls) == len(task.val)


def test_the_example_that_prunes_is_a_configuration() -> None:
    config = load_config(Path(__file__).parents[2] / "examples" / "msd-hippocampus-scd.yaml", [])
    model = fv.create_model(config.model.name, num_classes=3, **config.model.overrides)  # type: ignore[arg-type]
    assert model.config.prune_after == (0, 1)
    assert model.config.keep_ratio == (0.5, 0.25)
