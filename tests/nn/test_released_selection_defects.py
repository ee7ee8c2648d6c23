"""What the released selection code gets wrong, each shown to be right here. (Others stand with what they are about.)"""

import pytest
import torch
from torch import Tensor, nn

import laws
from foveate.geometry.patch_source import TensorPatches
from foveate.models.recognition import RecognitionConfig, RecognitionModel, build_recognition
from foveate.nn.heads import TaskSpec
from foveate.nn.query_attention import QueryAttention
from foveate.nn.selector import PatchSelector


def model_of(**changes: object) -> RecognitionModel:
    torch.manual_seed(0)
    settings = {"encoder": "features", "in_chans": 6, "width": 16, "keep": 5, "chunk": 7, **changes}
    return build_recognition(RecognitionConfig(tasks=(TaskSpec("a", "classes", 3),), **settings))  # type: ignore[arg-type]


def bag(seed: int, num: int = 40) -> TensorPatches:
    return TensorPatches(torch.randn(num, 6, generator=torch.Generator().manual_seed(seed)))


def selector(**settings: object) -> PatchSelector:
    torch.manual_seed(0)
    return PatchSelector(nn.Identity(), QueryAttention(6, 2, head_width=3), 5, **settings)  # type: ignore[arg-type]


def test_short_bags_are_not_filled_up_with_zeros_that_are_attended() -> None:
    """Released: the prediction of a bag of fewer than keep patches depends on the number of zero rows beside it."""
    model = model_of().eval()
    with torch.no_grad():
        laws.batch_invariance(lambda bags: list(model(bags)["a"]), [bag(0, 3), bag(1, 40), bag(2, 5)])


def test_a_batch_may_have_any_number_of_bags_of_any_size() -> None:
    """Released: a multiple of the sequential batch, and bags of the configured number of patches."""
    model = model_of().train()
    for sizes in ((40,), (40, 3, 17), (5, 5), (1, 2, 3, 4, 100)):
        said = model([bag(seed, num) for seed, num in enumerate(sizes)])["a"]
        assert said.shape == (len(sizes), 3)


@pytest.mark.parametrize("shuffle", [False, True])
def test_chosen_positions_are_those_of_the_bag_itself(shuffle: bool) -> None:
    """Released: they are dropped, and count in the shuffled order."""
    source = bag(0)
    choose = selector(rule="buffered", shuffle=shuffle)
    selection = choose.select(source, 7, torch.Generator().manual_seed(3))
    attended = choose.scorer.logits(source.read(torch.arange(40))).softmax(0).mean(1)
    assert selection.index.tolist() == selection.index.sort().values.tolist()
    assert int(attended.argmax()) in selection.index.tolist()


def test_shuffling_draws_from_the_given_generator_alone() -> None:
    """Released: from the global one."""
    choose = selector(rule="buffered", shuffle=True)
    laws.deterministic(lambda: choose.select(bag(0), 7, torch.Generator().manual_seed(3)).index)


def test_evaluation_is_never_shuffled() -> None:
    """Released: two evaluations of one model differ."""
    model = model_of(rule="buffered", shuffle=True).eval()
    laws.deterministic(lambda: model([bag(0), bag(1)]))
    assert model.train().selector().shuffle


def test_the_bag_is_never_held_as_one_tensor() -> None:
    """Released: all patches of an image in one dense tensor, even where it says lazy."""

    class Far(TensorPatches):
        largest = 0

        def read(self, index: Tensor) -> Tensor:
            Far.largest = max(Far.largest, len(index))
            return super().read(index)

    model = model_of()
    model([Far(torch.randn(500, 6))])
    assert Far.largest == 7
