"""What is told of a network that was made elsewhere, by its package or by a card of volseg."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm

from volseg.inference.model_card import MULTIPLE, ModelCard
from volseg.inference.onnx_graph import Step

FIXED_TILE = 512  # voxels a side, about, where a network takes sizes that have no common multiple


@dataclass(frozen=True)
class Description:
    """What is told of a network; what is not told is left as it is here.

    Attributes
    ----------
    name, use
        For people.
    normalize
        "volume" (mean and deviation of the image), "fixed" (``mean`` and ``std``) or "percentiles" (those become 0 and 1).
    before, after
        Steps after that, and after the network, see `onnx_graph.adapted`.
    inputs, outputs
        Names of the channels.
    depth
        Sections of a network in three dimensions, 0 for one in two.
    multiple, fixed
        Of the size of tiles, see `model_card.Graph`; 0 where nothing is told.
    halo
        Voxels at the borders of tiles that are not to be trusted.
    card
        That of a model of volseg, as JSON has it.
    """

    name: str
    use: str = ""
    normalize: str = "volume"
    mean: float = 0.0
    std: float = 1.0
    percentiles: tuple[float, float] = (0.0, 100.0)
    before: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    depth: int = 0
    multiple: int = 0
    fixed: bool = False
    halo: int = 0
    voxel_size_nm: tuple[float, float, float] | None = None
    card: dict | None = None


def of_card(described: Description, card: ModelCard) -> Description:
    """What the card of a model of volseg tells, besides what is ``described``."""
    names = tuple(name if name in card.told_heads else "" for name in card.heads)
    told = replace(
        described, name=card.name, use=card.use, outputs=names, multiple=card.multiple,
        fixed=bool(card.graph and card.graph.fixed), voxel_size_nm=card.voxel_size_nm, card=card.to_json(),
    )  # fmt: skip
    if card.graph and card.graph.percentiles:
        told = replace(told, normalize="percentiles", percentiles=card.graph.percentiles)
    return told


def common_multiple(smallest: int, step: int) -> tuple[int, bool]:
    """What tiles of ``smallest`` plus any number of ``step`` voxels are multiples of, and whether just one size will do.

    >>> common_multiple(64, 16), common_multiple(256, 0), common_multiple(20, 16)
    ((64, False), (256, True), (516, True))
    """
    if not step:
        return smallest, True
    if smallest % step:
        return smallest + step * max(0, round((FIXED_TILE - smallest) / step)), True
    together = lcm(MULTIPLE, step)
    return -(-smallest // together) * together, False
