"""A slide's plan is true: what it projects from the header is what a process then needs, and a budget is kept."""

import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from foveate.budget import Settings, settings_within
from foveate.cli import main
from foveate.errors import BudgetError, ShapeError
from foveate.geometry.lazy import lazy_patches
from foveate.models import create_config
from foveate.plan_slide import BlankSlide, Rates, plan_slide
from foveate.testing import write_slide

RATES = Rates(product=1e11, attention=5e10, decoded=2e8)


@pytest.fixture(scope="session")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slide(tmp_path_factory.mktemp("plan") / "slide.tif", 2048, tile=256)


def test_every_stage_has_its_bytes_and_time() -> None:
    found = plan_slide("apf_vit_tiny", (65536, 65536), max_leaves=1024, rates=RATES)
    assert [step.name for step in found.steps] == ["cut", "patches", "model", "logits", "write"]
    assert all(step.num_bytes > 0 for step in found.steps)
    assert found.peak_bytes == max(step.num_bytes for step in found.steps)
    assert found.flops == found.model.flops
    model = next(step for step in found.steps if step.name == "model")
    attention = sum(stage.flops for stage in found.model.stages if stage.name == "attention")
    assert model.seconds == pytest.approx(attention / 5e10 + (found.flops - attention) / 1e11)


def test_text_says_what_is_assumed_and_what_is_estimated() -> None:
    text = plan_slide("apf_vit_tiny", (20000, 30000), max_leaves=64, rates=RATES).to_text()
    assert "slide 20000 x 30000, 3 channels of uint8, levels 1, 4, 16, 64 (assumed)" in text
    assert "estimates: seconds from 100 GFLOP/s in products, 50 in attention, 200 Mpx/s of JPEG, measured now" in text
    assert "as if 50% of the slide were tissue" in text


def test_a_slide_is_planned_from_its_header(slide: Path) -> None:
    from foveate.io.raster import open_raster

    source = open_raster(slide)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pixel was read")

    source.read = refuse  # type: ignore[method-assign]
    found = plan_slide("apf_vit_tiny", source, max_leaves=64, rates=RATES)
    assert "(of the file)" in found.to_text()


def test_memory_follows_leaves_and_not_pixels() -> None:
    small, large = (plan_slide("apf_vit_tiny", (side, side), max_leaves=1024, rates=RATES) for side in (8192, 65536))
    assert large.program_bytes + large.peak_bytes < 1.1 * (small.program_bytes + small.peak_bytes)
    more = plan_slide("apf_vit_tiny", (65536, 65536), max_leaves=4096, rates=RATES)
    assert more.peak_bytes > 1.5 * large.peak_bytes


def test_leaves_are_never_more_than_cells() -> None:
    found = plan_slide("apf_vit_tiny", (512, 512), max_leaves=10**6, min_size=64, rates=RATES)
    assert found.model.num_leaves == 64


def test_a_budget_halves_leaves_until_it_is_kept() -> None:
    free = plan_slide("apf_vit_tiny", (65536, 65536), max_leaves=1024, rates=RATES)
    budget = free.program_bytes + free.peak_bytes - 1
    kept = plan_slide("apf_vit_tiny", (65536, 65536), max_leaves=1024, rates=RATES, budget=budget)
    assert kept.program_bytes + kept.peak_bytes <= budget
    assert kept.model.num_leaves < 1024
    assert f"max_leaves={kept.model.num_leaves} instead of 1024" in kept.to_text()
    same = plan_slide("apf_vit_tiny", (65536, 65536), max_leaves=64, rates=RATES, budget=2**40)
    assert same.choice == ()


def test_a_budget_that_nothing_keeps_is_refused_with_the_numbers() -> None:
    with pytest.raises(BudgetError, match=r"budget 9.5 MiB is below the [\d.]+ \wiB that one leaf needs \(program"):
        plan_slide("apf_vit_tiny", (4096, 4096), max_leaves=64, rates=RATES, budget=10**7)


def test_what_costs_time_goes_before_what_costs_quality() -> None:
    class Free:
        peak_bytes = 10**15

    tried: list[Settings] = []

    def cost(settings: Settings) -> Free:
        tried.append(settings)
        return Free()

    with pytest.raises(BudgetError):
        settings_within(1, Settings(4, 4), cost, training=True)
    assert tried == [
        Settings(4, 4),
        Settings(4, 4, True),
        Settings(4, 2, True),
        Settings(4, 1, True),
        Settings(2, 1, True),
        Settings(1, 1, True),
    ]


def test_impossible_plans() -> None:
    with pytest.raises(BudgetError, match="max_leaves=0, min_size=16: both must be at least 1"):
        plan_slide("apf_vit_tiny", (4096, 4096), max_leaves=0, rates=RATES)
    with pytest.raises(ShapeError, match=r"shape \(8, 8, 8\) of a slide; give its height and width"):
        plan_slide("apf_vit_tiny", (8, 8, 8), max_leaves=4, rates=RATES)


def test_rates_are_measured() -> None:
    assert min(vars(Rates.measure()).values()) > 1e6


def test_a_blank_slide_can_be_cut() -> None:
    patches, reading = lazy_patches(BlankSlide((3000, 2000)), 64)
    assert len(patches.pixels) == 1
    assert reading.pixels[0] == 0


def test_cutting_stays_within_its_stage(slide: Path) -> None:
    from foveate.io.raster import open_raster

    source = open_raster(slide)
    lazy_patches(source, 16)
    tracemalloc.start()
    lazy_patches(open_raster(slide), 256)
    measured = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    cut = plan_slide("apf_vit_tiny", source, max_leaves=256, min_size=16, rates=RATES).steps[0]
    assert measured <= cut.num_bytes - cut.held["weights"]


def test_the_command_line_chooses_and_refuses(capsys: pytest.CaptureFixture[str], slide: Path) -> None:
    words = ["plan", str(slide), "--model", "apf_vit_tiny", "--max-leaves", "64"]
    assert main([*words, "--budget", "40GB"]) == 0
    assert "slide 2048 x 2048" in capsys.readouterr().out
    assert main([*words, "--budget", "1MB"]) == 2
    assert "raise it, or take a smaller model or image" in capsys.readouterr().err
    assert main(["plan", "64x64", "--budget", "much"]) == 2
    assert "'much' is not a size in bytes" in capsys.readouterr().err


_MEASURE = r"""
import pathlib, re, sys, torch
from foveate.models import create_model
from foveate.tasks.config import config_from_dict, save_config
from foveate.tasks.predict import predict
from foveate.tasks.trained import SETTINGS
torch.set_num_threads(1)
def peak():  # of this program alone; getrusage remembers the peak of the process that started it
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", pathlib.Path("/proc/self/status").read_text())[1])
folder, large, small, leaves = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
torch.manual_seed(0)
create_model("apf_vit_tiny", depth=2).save_pretrained(folder / "model")
for name, number in (("small", 16), ("large", leaves)):
    settings = {"tree": {"max_leaves": number, "min_size": 16}, "model": {"name": "apf_vit_tiny"}}
    save_config(config_from_dict(settings), folder / "model" / SETTINGS)
    if name == "small":
        predict(folder / "model", small, folder / "small", format="ome.tif")  # imports and kernels
    else:
        before = peak()
        predict(folder / "model", large, folder / "large", format="ome.tif")
print(before, peak())
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slide(tmp_path_factory.mktemp("large") / "slide.tif", 8192)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("leaves", [1024, 4096, 16384])
def test_law_the_plan_is_true_for_a_slide(tmp_path: Path, large: Path, leaves: int) -> None:
    from foveate.io.raster import open_raster

    small = write_slide(tmp_path / "small.tif", 512, tile=256)
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _MEASURE, *map(str, (tmp_path, large, small, leaves))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    program, measured = map(int, done.stdout.split())
    config = replace(create_config("apf_vit_tiny"), depth=2)
    projected = plan_slide(config, open_raster(large), max_leaves=leaves, min_size=16, rates=RATES).peak_bytes
    assert measured <= program + projected <= 1.25 * measured
