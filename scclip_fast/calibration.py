"""Parts that the calibrations of CLIP and SAM3 share: outliers, layer indices, checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .ops import _check, lof_scores, norm_scores, outlier_mask

if TYPE_CHECKING:
    from typing_extensions import Self

SCORES = ("lof", "norm", "either")


class Settings:
    """The settings of a dataclass as a dictionary for JSON, and back."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings by name, in types that JSON has."""
        values = asdict(self)  # type: ignore[call-overload]  # the subclasses are dataclasses
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Returns the configuration with these settings; others have their defaults.

        Raises:
            ValueError: there is no setting of a name.
        """
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(settings.keys() - known):
            raise ValueError(f"settings must be of {', '.join(sorted(known))}; got {unknown[0]!r}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})


class Outliers(NamedTuple):
    """The outliers among the tokens of a batch of images.

    Attributes:
        scores: (B, N), at least float32: LOF, or `norm_scores` where the rule is "norm".
        mask: (B, N) bool, True for an outlier.
    """

    scores: Tensor
    mask: Tensor


def find_outliers(
    tokens: Tensor, n_neighbors: int, contamination: float, score: str = "lof"
) -> Outliers | None:
    """Scores tokens (B, N, D) and marks the outliers of each image.

    Args:
        score: a rule of `SCORES`: "lof", "norm" for `norm_scores`, or "either" for the outliers of
            both, where each rule marks the share `contamination`.

    Returns:
        None if N <= n_neighbors. All other tokens are neighbours then, so LOF carries no
        information: the two tokens that are farthest apart tie for the outlier.
    """
    if tokens.shape[1] <= n_neighbors:
        return None
    scores = norm_scores(tokens) if score == "norm" else lof_scores(tokens, n_neighbors)
    mask = outlier_mask(scores, contamination)
    if score == "either":
        mask = mask | outlier_mask(norm_scores(tokens), contamination)
    return Outliers(scores, mask)


def stage_names(config: type) -> tuple[str, ...]:
    """Names of the stages of a configuration: its settings that are True or False."""
    return tuple(field.name for field in fields(config) if isinstance(field.default, bool))


def scaled_index(index: int, published: int, layers: int) -> int:
    """Layer of a model at the relative depth of layer `index` among `published` layers.

    Depth is counted in finished layers, index + 1. The result is at most layers - 2, the last layer
    but one, because the calibration reads no output of the last layer.
    """
    return min(max(round((index + 1) * layers / published) - 1, 0), layers - 2)


def check_settings(config: Any, layers: int, depth: str, hint: str = "") -> None:
    """Raise unless the settings that both models share fit a model of `layers` layers.

    Args:
        config: SCCLIPConfig or Sam3CalibrationConfig.
        depth: `layers` in the model's words, for the error, such as "12 blocks".
        hint: follows `depth` in the error for a single layer index.

    Raises:
        TypeError: a setting has another type.
        ValueError: a setting is out of its range.
    """
    outputs = layers - 1
    for name in ("pre_adjust_idx", "post_adjust_idx", "multi_start_idx"):
        _check.integer(name, getattr(config, name), 0, outputs - 1, f" for {depth}{hint}")
    start = config.multi_start_idx
    why = f" for {depth} and multi_start_idx={start}"
    _check.integer("multi_end_idx", config.multi_end_idx, start + 1, outputs, why)
    _check.integer("outlier_n_neighbors", config.outlier_n_neighbors, 1)
    _check.contamination(config.outlier_contamination, "outlier_contamination")
    _check.choice("outlier_score", config.outlier_score, SCORES)
    _check.number("gamma", config.gamma, 0)
    for name in stage_names(type(config)):
        _check.switch(name, getattr(config, name))
