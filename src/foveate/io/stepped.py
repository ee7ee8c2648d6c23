"""A plane whose coarser levels are whole numbers of its pixels: what rasters that make their levels have in common."""


class SteppedPlane:
    """Shape and levels of a plane, from its sides and the steps of its levels.

    Args:
        shape: (H, W) of level 0.
        steps: level-0 pixels per pixel of every level, 1 first, rising.
    """

    def __init__(self, shape: tuple[int, ...], steps: list[int]) -> None:
        self._shape, self._steps = (int(shape[0]), int(shape[1])), steps

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape (H, W) of level 0."""
        return self._shape

    @property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Spatial shape of every level; a last pixel may reach beyond the edge and stands for what is inside."""
        return tuple(tuple(-(-side // step) for side in self._shape) for step in self._steps)

    @property
    def downsamples(self) -> tuple[tuple[float, ...], ...]:
        """Level-0 pixels per pixel of every level, whole numbers."""
        return tuple((float(step), float(step)) for step in self._steps)
