"""Selection and training step against the published loop, in one process, in turn; and whether selections agree.

Legend: B images, N patches.
"""

from typing import Any

import torch
from torch import Tensor

import _ips_data as data
import record
from _ips_jobs import DrawnPatches
from _published_ips import PublishedSelection
from _timing import cpu_seconds, speed_up
from foveate.geometry.patch_source import GridPatches, TensorPatches
from foveate.models import create_model
from foveate.models.recognition import RecognitionModel
from foveate.nn.fast_copy import fast_copy
from foveate.nn.heads import total_loss
from foveate.nn.stream import block_rows
from foveate.nn.warm_start import WarmStart

Claims = list[dict[str, Any]]
LR, DECAY = 1e-3, 0.1


def equal(num: int, keep: int, seeds: int, every: int) -> Claims:
    """Ours for every chunk size, and the published rule, against attention over all patches at once."""
    asked = same = 0
    overlap: dict[float, list[float]] = {1.0: [], 9.0: []}
    for seed in range(seeds):
        for sharp, shares in overlap.items():
            torch.manual_seed(seed)
            ours, theirs = data.feature_pair(64, 128, keep, sharp)
            features = torch.randn(num, 64)
            with torch.no_grad():
                score = theirs.pool.score(theirs.encode(features[None]))[0]
            best = score.topk(keep).indices.sort().values
            chunks = range(1, num + 1) if seed < every else (1, 7, keep, 100, num)
            for chunk in chunks:
                found = ours.selector().select(TensorPatches(features), chunk).index
                asked, same = asked + 1, same + bool(torch.equal(found, best))
            theirs.chunk = keep
            index, _ = theirs.select(features[None])
            shares.append(float(torch.isin(index[0], best).double().mean()))
    note = (
        f"{same} of {asked}: {every} seeds with chunks 1 to {num}, {seeds - every} with five chunk sizes; N = {num}, "
    )
    note += f"keep {keep}, 8 heads, attention at its start and 9 times as sharp"
    claims = [
        record.claim("ips.equal.ours", same / asked, "share", "attention over all patches at once", 1.0, note=note)
    ]
    for sharp, shares in overlap.items():
        one = sum(share == 1 for share in shares)
        claims.append(
            record.claim(
                f"ips.equal.published.x{sharp:g}",
                sum(shares) / len(shares),
                "share of the kept",
                "attention over all patches at once",
                "0.97 at its start, 0.79 nine times as sharp, found before",
                met=True,
                spread=(min(shares), max(shares)),
                note=f"chunk {keep}; {one} of {len(shares)} seeds identical; what the published rule does, no target",
            )
        )
    return claims


class Ours:
    """Our model with its optimiser; ``half``: bfloat16 in the passes with gradient, channels last."""

    def __init__(self, bags: list[GridPatches], targets: data.Targets, half: bool, **settings: Any) -> None:
        self.model, self.bags, self.targets, self.half = data.our_model(**settings), bags, targets, half
        if half:
            self.model.encoder.to(memory_format=torch.channels_last)
        self.model.train()
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=DECAY)

    def select(self) -> Any:
        """Choose the patches and read them."""
        return self.model.choose(self.bags)

    def learn(self, chosen: Any) -> None:
        """What follows the choice."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            logits = self.model(chosen)
        finish(total_loss(self.model.config.tasks, logits, self.targets).mean(), self.optimiser)


class Published:
    """The published loop; all patches lie in memory in float32 before it starts."""

    def __init__(self, model: PublishedSelection, patches: Tensor, targets: data.Targets) -> None:
        self.model, self.patches, self.targets = model.train(), patches, targets
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)

    def select(self) -> Any:
        """Choose the patches."""
        return self.model.select(self.patches)

    def learn(self, chosen: Any) -> None:
        """What follows the choice."""
        index, patches = chosen
        finish(self.model.loss(self.model.predict(patches, index), self.targets), self.optimiser)


def finish(loss: Tensor, optimiser: torch.optim.Optimizer) -> None:
    """Backward pass and step."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()


def steps(side_of: int, batch: int, keep: int, turns: int, targets: tuple[float, float]) -> Claims:
    """The paper's setting for megapixel digits on images of a side, all sides of the comparison in turn."""
    images = data.draw(0, batch, side_of, data.banks()[0])
    labels = data.targets_of([image.labels for image in images])
    bags, patches = data.grids(images), data.dense(images)
    chunk, num = keep, patches.shape[1]
    filled = float((patches.flatten(2) > 0).any(2).double().mean())
    torch.manual_seed(0)
    ours = {
        "float32": Ours(bags, labels, False, keep=keep, chunk=1024, precision="folded"),
        "bfloat16": Ours(bags, labels, True, keep=keep, chunk=1024, precision="bf16"),
    }
    theirs = Published(data.published_model(keep, chunk, num), patches, labels)
    sides: dict[str, Ours | Published] = {"published": theirs, **ours}
    taken: dict[str, dict[str, list[float]]] = {what: {name: [] for name in sides} for what in ("selection", "step")}
    for one in ours.values():
        one.learn(one.select())
    for _ in range(turns):
        for name, side in sides.items():
            chosen: list[Any] = []
            first = cpu_seconds(lambda: chosen.append(side.select()))  # noqa: B023
            taken["selection"][name].append(first)
            taken["step"][name].append(first + cpu_seconds(lambda: side.learn(chosen[0])))  # noqa: B023
    claims: Claims = []
    setting = f"N = {num} (side {side_of}, {filled:.0%} of the patches not blank), batch {batch}, keep {keep}"
    least = round(filled * num * batch) * convolution_seconds(
        ours["bfloat16"].model, patches[0, : block_rows(patches[0])]
    )
    value = min(taken["selection"]["published"]) / least
    note = f"{setting}: {least:.3f} s for the convolutions of the patches that are not blank, nothing else, in bfloat16"
    title, against = f"ips.n{num}.selection.convolutions", "published loop, float32"
    claims.append(record.claim(title, value, "x", against, "what is the most that can be had", met=True, note=note))
    for (what, times), goal in zip(taken.items(), targets, strict=True):
        for name in ours:
            ratio, spread = speed_up(times["published"], times[name])
            note = f"{setting}: {min(times['published']):.2f} s against {min(times[name]):.3f} s, n = {turns}"
            title = f"ips.n{num}.{what}.{name}"
            claims.append(record.claim(title, ratio, "x", "published loop, float32", goal, spread=spread, note=note))
    return claims


def convolution_seconds(model: RecognitionModel, patches: Tensor) -> float:
    """CPU seconds that the convolutions of our copy in bfloat16 take for one patch, without anything between them."""
    copy, seen = fast_copy(model.encoder, torch.bfloat16), []
    for part in copy.modules():
        if isinstance(part, torch.nn.Conv2d):
            part.register_forward_hook(lambda one, given, _: seen.append((one, given[0])))
    with torch.no_grad():
        copy(patches)
        seconds = sum(min(cpu_seconds(lambda: one(given)) for _ in range(20)) for one, given in list(seen))  # noqa: B023
    return seconds / len(patches)


def warm(num: int, epochs: int, side: int = 32) -> Claims:
    """A warm start while the model learns, against looks at everything: time, and how many of the kept it misses."""
    torch.manual_seed(0)
    model: RecognitionModel = create_model(
        "ips_resnet18", stages=2, width=128, keep=100, chunk=1024, precision="bf16", rank="mean"
    )
    bag, memory = DrawnPatches(num, side), WarmStart(every=epochs + 2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    target = {"label": torch.zeros(1, dtype=torch.int64)}
    shares, fast, slow, bounds = [], [], [], []
    found: list[Any] = []
    memory.select(model.train().selector(), "bag", bag, 1024)
    for _ in range(epochs):
        chosen = model.train().choose([bag], warm=memory, names=["bag"])
        finish(total_loss(model.config.tasks, model(chosen), target).mean(), optimiser)
        selector = model.selector()
        fast.append(cpu_seconds(lambda: found.append(memory.select(selector, "bag", bag, 1024))))  # noqa: B023
        slow.append(cpu_seconds(lambda: found.append(selector.select(bag, 1024))))  # noqa: B023
        some, whole = found[-2:]
        shares.append(float(torch.isin(some.index, whole.index).double().mean()))
        bounds.append(some.coverage.missed)
    times, spread = speed_up(slow, fast)
    note = f"N = {num}, no blank patch, keep 100, {min(slow):.2f} s against {min(fast):.3f} s; {epochs} looks with a "
    note += f"training step at 1e-3 before each; the kept agree in {min(shares):.0%} to {max(shares):.0%}, at most "
    note += f"{max(bounds):.0f} of 100 were said to be missed"
    title = f"ips.n{num}.selection.warm"
    return [record.claim(title, times, "x", "our selection that looks at everything", 1.0, spread=spread, note=note)]
