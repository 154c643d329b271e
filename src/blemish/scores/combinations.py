"""Several scores in one, each in units of what normal tiles show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from blemish.errors import ConfigError, nearest_names
from blemish.models.contracts import Output
from blemish.scores.contracts import ExplainedScore, FittableScore, explain

JOINS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda scores: scores.sum(dim=1, keepdim=True),
    "max": lambda scores: scores.amax(dim=1, keepdim=True),
    "product": lambda scores: scores.prod(dim=1, keepdim=True),
}


class CombinedScore(ExplainedScore):
    """Sum, maximum or product over several scores of max(0, score - location) / scale: no unit outweighs another.

    `fit` learns both of each score, over the pixels of normal tiles: the location is the median, the scale reaches
    from there to a high quantile. Until then they are 0 and 1. A sum rises where one score does, a product only where
    all do; it is not moved by where a score begins, so its location stays 0. What was expected is told by the first
    score.

    Args:
        terms: the scores, torch modules; one that is fitted itself is fitted first.
        join: sum, max or product.
        quantile: between 0.5 and 1.

    Raises:
        ConfigError: no term, an unknown join, a quantile out of range, or (in `fit`) no tiles.
    """

    location: Tensor
    scale: Tensor

    def __init__(self, terms: Sequence[nn.Module], join: str = "sum", quantile: float = 0.999) -> None:
        super().__init__()
        if not terms:
            raise ConfigError("Expected one or more scores in score.terms, found none.")
        if join not in JOINS:
            raise ConfigError(f"Unknown score.join '{join}': {nearest_names(join, JOINS)}")
        check_quantile(quantile)
        self.terms = nn.ModuleList(terms)
        self.join, self.quantile = join, quantile
        self.register_buffer("location", torch.zeros(len(terms)))
        self.register_buffer("scale", torch.ones(len(terms)))

    def explain(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, expected = self._ask(model, x)
        location, scale = (buffer.to(scores)[:, None, None] for buffer in (self.location, self.scale))
        scores = ((scores - location) / scale).clamp(min=0)
        return JOINS[self.join](scores), expected

    def _ask(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of all terms, (B, K, H, W), and what the first one expected."""
        once = Remembering(model)
        explained = [explain(term, once, x) for term in self.terms]
        return torch.cat([score for score, _ in explained], dim=1), explained[0][1]

    def fit(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """As `FittableScore`."""
        batches = list(batches)  # each term goes through them anew
        if not batches:
            raise ConfigError(f"{type(self).__name__} learns from normal tiles, found none: set split.validation.")
        for term in self.terms:
            if isinstance(term, FittableScore):
                term.fit(model, batches)
        scores = [self._ask(model, x)[0] for x in batches]
        for number in range(len(self.terms)):
            values = torch.cat([score[:, number].flatten() for score in scores])
            if self.join != "product":
                self.location[number] = quantile_of(values, 0.5)
            reach = quantile_of(values, self.quantile) - self.location[number].to(values)
            self.scale[number] = reach.clamp(min=1e-6)  # a score may be constant on normal tiles


def check_quantile(quantile: float) -> None:
    """Raise ConfigError unless it is between 0.5 and 1."""
    if not 0.5 < quantile < 1:
        raise ConfigError(f"Expected score.quantile between 0.5 and 1, found {quantile}.")


def quantile_of(values: Tensor, share: float) -> Tensor:
    """A scalar of the 1-D tensor; torch.quantile refuses so many values."""
    return values.kthvalue(max(1, round(share * len(values)))).values


class Remembering(nn.Module):
    """A model that answers the same tiles but once, so that several terms cost one forward pass.

    While it trains (Monte Carlo puts it so to draw) it is asked anew. Tiles are the same if they are the same object.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._answer: tuple[Tensor, Output] | None = None

    def forward(self, x: Tensor) -> Output:
        if self.training or (x.requires_grad and torch.is_grad_enabled()):
            answer: Output = self.model(x)
            return answer
        if self._answer is None or self._answer[0] is not x:
            self._answer = (x, self.model(x))
        return self._answer[1]
