"""The plan is true: operations equal torch's own count, and measured peak <= projected peak <= 1.25 x measured."""

import math
import re
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from foveate.budget import format_bytes, resident_bytes
from foveate.errors import BudgetError, ConfigError
from foveate.geometry.leaves import uniform_leaves
from foveate.geometry.patches import Patches
from foveate.geometry.tree import adaptive_leaves
from foveate.ledger import Ledger
from foveate.models import build_model, create_config
from foveate.plan import cut_bytes, encoder_flops, plan, plan_image

NAMES = ["apf_vit_tiny", "apf_vit_tiny_linear", "apf_vit_tiny_3d"]


def small(name: str, **changes: object) -> object:
    settings = {"width": 48, "depth": 2, "num_heads": 3, "out_blocks": (0, 1), "decoder_width": 8}
    return create_config(name, **{**settings, **changes})


def run_for_real(
    config: object, num_leaves: int, batch_size: int, *, training: bool, shape: tuple[int, ...] | None = None
) -> Ledger:
    """The measured counterpart: the same batch on the CPU, with real numbers in it; leaves in a row or in a shape."""
    model = build_model(config).train(training)
    sides = (config.patch_size,) * config.num_dims
    leaves = uniform_leaves(shape or (*sides[:-1], sides[0] * num_leaves), config.patch_size)
    pixels = torch.rand(num_leaves * batch_size, config.in_chans, *sides)
    patches = Patches(pixels, (leaves,) * batch_size)
    ledger = Ledger([*model.parameters(), *model.buffers(), pixels])
    with torch.set_grad_enabled(training), ledger:
        logits = model(patches)
        if training:
            loss = -(functional.log_softmax(logits, dim=1) * torch.rand_like(logits)).sum()
            loss.backward()
    return ledger


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_law_the_plan_is_true(name: str, training: bool) -> None:
    config = small(name)
    projected = plan(config, 24, 3, training=training).activation_bytes
    measured = run_for_real(config, 24, 3, training=training).peak
    assert measured <= projected <= 1.25 * measured


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["scd_vit_tiny", "scd_vit_tiny_3d"])
def test_law_the_plan_is_true_where_tokens_are_pruned(name: str, training: bool) -> None:
    """Which tokens stay decides how many neighbours they have; the rehearsal spreads them evenly."""
    config = small(name, depth=4, out_blocks=(0, 3), prune_after=(0, 2), keep_ratio=(0.5, 0.25))
    projected = plan(config, 100, 2, training=training).activation_bytes
    measured = run_for_real(config, 100, 2, training=training).peak
    assert measured <= projected <= 1.25 * measured


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_law_the_plan_is_true_of_unetr(exact: bool, training: bool) -> None:
    points = {"depth": 4, "prune_after": (0, 2), "out_blocks": (0, 3)} | (
        {"keep_ratio": 0.5} if exact else {"keep_ratio": (0.5, 0.25)}
    )
    config = small("scd_unetr_small_3d_p8", exact=exact, **points)
    projected = plan(config, 64, 2, training=training).activation_bytes
    measured = run_for_real(config, 64, 2, training=training, shape=(32, 32, 32)).peak
    assert measured <= projected <= 1.25 * measured


@pytest.mark.parametrize("shape", [(24, 40, 32), (32, 32, 32)], ids=["brick", "cube"])
def test_dense_decoders_paint_every_cell_however_few_leaves(shape: tuple[int, ...]) -> None:
    config = small("scd_unetr_small_3d_p8", depth=4, prune_after=(0, 2), keep_ratio=0.5, out_blocks=(0, 3))
    grid = [side // 8 for side in shape]
    plans = [plan(config, leaves, cells=grid) for leaves in (math.prod(grid), 40)]
    decoders = [next(stage.flops for stage in one.stages if stage.name == "decoder") for one in plans]
    assert decoders[0] == decoders[1]
    measured = run_for_real(config, math.prod(grid), 1, training=False, shape=shape).peak
    assert measured <= plans[0].activation_bytes <= 1.25 * measured
    assert "decoder" in plan_image(config, shape, max_leaves=40)
    assert plan(config, 41).num_leaves == 41


@pytest.mark.parametrize("name", NAMES)
def test_flops_equal_torch_counter(name: str) -> None:
    config = small(name)
    model = build_model(config).eval()
    sides = (config.patch_size,) * config.num_dims
    leaves = uniform_leaves((*sides[:-1], sides[0] * 20), config.patch_size)
    patches = Patches(torch.rand(20, config.in_chans, *sides), (leaves,))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(patches)
    length = 20 + int(config.class_token) + config.num_registers
    attention = config.depth * 4 * length**2 * config.width  # the CPU kernel counts as 0 in torch
    counted = {stage.name: stage.flops for stage in plan(config, 20).stages}
    assert sum(counted.values()) == counter.get_total_flops() + attention


@pytest.mark.parametrize("leaves", [1, 50])
def test_encoder_formula_equals_rehearsal(leaves: int) -> None:
    config = create_config("apf_vit_tiny_linear")  # the formula leaves out the position codes, 2 % at this width
    stages = {stage.name: stage.flops for stage in plan(config, leaves).stages}
    encoder = sum(stages.get(name, 0) for name in ("embedding", "encoder", "attention", "mlp"))
    assert encoder == pytest.approx(encoder_flops(config, leaves), rel=0.03)


def test_published_vit_base_is_reproduced() -> None:
    config = replace(create_config("apf_vit_base"), class_token=True, num_registers=0, depth=12)
    assert encoder_flops(config, 196) / 2 == pytest.approx(17.58e9, rel=0.01)


def test_batch_and_training_scale_as_they_should() -> None:
    config = small("apf_vit_tiny")
    one, four, train = plan(config, 16), plan(config, 16, 4), plan(config, 16, 4, training=True)
    assert four.flops == 4 * one.flops
    assert four.num_tokens == 64
    assert four.parameter_bytes == one.parameter_bytes
    assert 2.5 * four.flops < train.flops < 3.6 * four.flops
    assert train.optimiser_bytes == 2 * train.parameter_bytes
    assert one.optimiser_bytes == 0


def test_checkpointing_saves_memory_and_costs_operations() -> None:
    config = small("apf_vit_tiny_linear", depth=8, out_blocks=(7,))
    plain = plan(config, 64, training=True)
    saving = plan(replace(config, checkpoint=True), 64, training=True)
    assert saving.activation_bytes < 0.7 * plain.activation_bytes
    assert saving.flops > plain.flops


def test_half_precision_halves_weights() -> None:
    config = small("apf_vit_tiny_linear")
    assert plan(config, 16).parameter_bytes == 2 * plan(config, 16, dtype="bfloat16").parameter_bytes


def test_large_plans_need_no_memory() -> None:
    result = plan("apf_vit_base", 4096)
    assert result.parameter_bytes > 80e6 * 4
    assert result.flops > 1e12


def test_text_has_every_stage_and_the_peak() -> None:
    text = plan(small("apf_vit_tiny"), 16, 2, training=True).to_text()
    assert "one training step, 2 x 16 leaves, float32" in text
    assert all(f"\n  {name} " in text for name in ("embedding", "attention", "mlp", "decoder", "backward", "total"))
    assert re.search(r"peak memory [\d.]+ MiB = weights", text)


def test_plan_image_compares_with_the_uniform_grid() -> None:
    text = plan_image("apf_vit_tiny", (512, 512), max_leaves=64, min_size=16)
    assert "a uniform grid of 16 pixels has 1,024 tokens: 16.0x as many" in text


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"num_leaves": 0}, BudgetError, "num_leaves=0 must be at least 1"),
        ({"num_leaves": 4, "batch_size": -1}, BudgetError, "batch_size=-1 must be at least 1"),
        ({"num_leaves": 4, "dtype": "int8"}, ConfigError, "dtype='int8' is not one of float32"),
    ],
)
def test_impossible_plans(arguments: dict[str, object], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        plan("apf_vit_tiny", **arguments)


@pytest.mark.parametrize(("shape", "min_size"), [((512, 512), 8), ((500, 300), 4), ((64, 64, 48), 8)])
def test_law_the_plan_is_true_for_what_is_cut(shape: tuple[int, ...], min_size: int) -> None:
    def cut() -> None:
        adaptive_leaves(image.astype("float32"), 64, min_size=min_size, patch_size=8)

    image = np.random.default_rng(0).integers(0, 255, (3, *shape), np.uint8)
    cut()
    tracemalloc.start()
    cut()
    measured = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert measured <= 1.05 * cut_bytes(shape, 3, min_size)  # the leaves themselves
    assert cut_bytes(shape, 3, min_size) <= 1.25 * measured


def test_the_image_counts() -> None:
    text = plan_image("apf_vit_tiny", (4096, 4096), max_leaves=16)
    assert re.search(r"\n  input +0.00 +0% +362.7 MiB\n", text)
    assert "image 48.0 MiB + cutting it 314.7 MiB" in text


def test_a_budget_is_kept_or_refused() -> None:
    settings = {"max_leaves": 64, "training": True, "batch_size": 4}
    free = plan_image("apf_vit_tiny_linear", (128, 128), **settings)
    assert "chosen" not in free
    saving = plan_image("apf_vit_tiny_linear", (128, 128), **settings, budget=resident_bytes() + 90 * 2**20)
    assert "chosen to stay within" in saving
    assert "checkpoint=True instead of False" in saving
    with pytest.raises(BudgetError, match=r"budget 1.0 KiB is below the .* that one leaf needs"):
        plan_image("apf_vit_tiny_linear", (128, 128), **settings, budget=1024)


def test_plan_image_wants_the_right_number_of_axes() -> None:
    with pytest.raises(ConfigError, match=r"for 2-D images, but the shape \(8, 8, 8\) has 3 axes"):
        plan_image("apf_vit_tiny", (8, 8, 8), max_leaves=4)


def test_ledger_sees_what_is_alive_and_what_is_freed() -> None:
    layer = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    x = torch.rand(100, 64)
    ledger = Ledger([*layer.parameters(), x])
    with torch.no_grad(), ledger:
        out = layer(x)
    assert ledger.peak == 2 * 100 * 128 * 4
    assert ledger.live == out.numel() * 4
    del out
    assert ledger.live == 0
    assert ledger.stages()[0].flops == 2 * 2 * 100 * 64 * 128


def test_bytes_have_units() -> None:
    sizes = (5, 2048, 3 * 2**20, 5 * 2**29, 2**41)
    assert [format_bytes(size) for size in sizes] == ["5 B", "2.0 KiB", "3.0 MiB", "2.5 GiB", "2.0 TiB"]


_MEASURE = r"""
import pathlib, re, sys, torch
from foveate.geometry.leaves import uniform_leaves
from foveate.geometry.patches import Patches
from foveate.ledger import Ledger
from foveate.models import build_model, create_config
torch.set_num_threads(1)
def peak():  # of this program alone; getrusage remembers the peak of the process that started it
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", pathlib.Path("/proc/self/status").read_text())[1])
config = create_config("apf_vit_tiny", depth=2)
model = build_model(config).eval()
def batch(n):
    return Patches(torch.rand(n, 3, 16, 16), (uniform_leaves((16, 16 * n), 16),))
with torch.no_grad():
    model(batch(8))
    patches = batch(int(sys.argv[1]))
    before = peak()
    model(patches)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_law_the_plan_is_true_for_the_whole_process() -> None:
    import os

    leaves = 8192
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(leaves)], capture_output=True, text=True, check=True, env=env
    )
    measured = int(done.stdout)
    projected = plan(create_config("apf_vit_tiny", depth=2), leaves).activation_bytes
    assert measured <= 1.05 * projected  # the system counts in pages, and libraries keep small buffers
    assert projected <= 1.25 * measured
