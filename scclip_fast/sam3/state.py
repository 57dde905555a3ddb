"""What the modules of one calibrated model leave for each other during a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from . import stages
from .config import Sam3CalibrationConfig

TRUNK_FOUND = ("outlier_mask", "lof_scores", "calibrated_features")


@dataclass
class Shared:
    """Nothing of it outlives the forward pass of the model or its vision encoder.

    Attributes:
        features: (B, N, D), what the trunk's last layer needs of earlier ones (`config.taps`).
        found: what an output will show, or another module needs.
    """

    config: Sam3CalibrationConfig
    features: dict[str, Tensor] = field(default_factory=dict)
    found: dict[str, Tensor] = field(default_factory=dict)

    def tap(self, index: int, output: Tensor) -> Tensor:
        """Keep what is read of a layer's output (B, h, w, D), by `config.taps`."""
        tokens = output.flatten(1, 2)
        for name, layers in self.config.taps.items():
            if index in layers:
                first = index == layers.start
                self.features[name] = tokens if first else self.features[name] + tokens
        return output

    def run_last(self, x: Tensor, last: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        """The trunk's last layer, calibrated, on x (B, h, w, D).

        `last` is the frozen layer of such an x and the features (B, N, D) of its content attention
        or None.
        """
        grid = (x.shape[1], x.shape[2])

        def last_of_tokens(tokens: Tensor, content: Tensor | None) -> Tensor:
            return last(tokens.unflatten(1, grid), content).flatten(1, 2)

        tokens, outliers = stages.calibrate_trunk(
            x.flatten(1, 2), self.features, last_of_tokens, grid, self.config
        )
        self.features.clear()
        if outliers is not None:
            self.found["outlier_mask"] = outliers.mask.unflatten(1, grid)
            if self.config.outlier_score != "norm":
                self.found["lof_scores"] = outliers.scores.unflatten(1, grid)
        self.found["calibrated_features"] = tokens
        return tokens.unflatten(1, grid)

    def take(self, *names: str) -> dict[str, Tensor | None]:
        return {name: self.found.pop(name, None) for name in names}

    def clear(self) -> None:
        """After an error, too, no tensor stays."""
        self.features.clear()
        self.found.clear()
