# Copyright 2026 The leviathan-sna authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""KHRONOS for classification: components of splines that all classes share, and a dense read-out."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from sna_core.local_sum import check_points, local_sum
from sna_core.network import pairwise_product
from sna_core.normal_equations import smoothness_matrix

from .configuration import KhronosConfig
from .modeling import FIT_DEFAULTS
from .pretrained import KhronosPreTrainedModel, build_network
from .tables import ROWS_AT_ONCE, TrainingData, as_tensor, training_data

HISTORY = 50  # steps that L-BFGS remembers
SMALLEST_CHANGE = 1e-9  # of the objective or all parameters: a search that moves less has arrived, too


@dataclass(frozen=True)
class KhronosClassificationFit:
    """What :meth:`KhronosForClassification.fit` found.

    Attributes:
        converged: Whether the best start came to an end before ``max_iterations``.
        num_iterations: Its iterations.
        objective: Cross-entropy plus penalty.
        cross_entropy: Mean over the points, in nats.
        accuracy: Fraction of the points, by weight, whose label has the largest logit.
    """

    converged: bool
    num_iterations: int
    objective: float
    cross_entropy: float
    accuracy: float


@dataclass
class KhronosClassifierOutput(ModelOutput):
    """What [`KhronosForClassification`] returns.

    Args:
        loss: Mean cross-entropy in nats, where labels were given.
        logits: (..., num_labels).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class KhronosForClassification(KhronosPreTrainedModel):
    r"""Logits of ``config.num_labels`` classes from shared components.

    .. math::
        z_o(x) = b_o + \sum_{j=1}^{r} c_{oj} \prod_{i=1}^{d} \psi_i^{(j)}(x_i)

    ``network`` holds the components and c, ``bias`` is b. transformers has no Auto class for tables: load this by its
    own ``from_pretrained``.

    Raises:
        ValueError: If there are fewer than two labels.
    """

    def __init__(self, config: KhronosConfig):
        super().__init__(config)
        num_labels = config.num_labels
        if num_labels is None or num_labels < 2:
            raise ValueError(f"num_labels = {num_labels}; expected at least 2 classes.")
        self.network = build_network(config, num_labels, shared_components=True)
        self.bias = nn.Parameter(torch.zeros(num_labels))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.zeros_(self.bias)

    @can_return_tuple
    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> KhronosClassifierOutput:
        """Evaluates the logits, and the mean cross-entropy where labels are given.

        Exported (``torch.export``, ONNX), where nothing can raise, they are NaN at points outside the box while
        ``extrapolate="raise"``.

        Args:
            x: Points (..., num_inputs).
            labels: Integers from 0 to num_labels - 1, (...).

        Raises:
            ValueError: If a point is not finite, or outside the box while ``extrapolate="raise"``, or a shape or dtype
                does not fit.
        """
        logits = self.bias + self._values(x)
        if labels is None:
            return KhronosClassifierOutput(logits=logits)
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; expected {tuple(logits.shape[:-1])}, one for each point."
            )
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
        return KhronosClassifierOutput(loss=loss, logits=logits)

    def predict(self, x: ArrayLike | Tensor) -> np.ndarray | Tensor:
        """The label of the largest logit: (points, num_inputs) -> (points,). Raises as :meth:`forward`."""
        return self._by_rows(lambda part: self(part).logits.argmax(-1), x)

    def predict_proba(self, x: ArrayLike | Tensor) -> np.ndarray | Tensor:
        """Probabilities of the labels: (points, num_inputs) -> (points, num_labels). Raises as :meth:`forward`."""
        return self._by_rows(lambda part: self(part).logits.softmax(-1), x)

    def fit(
        self,
        x: ArrayLike | Tensor,
        labels: ArrayLike | Tensor,
        *,
        ridge: float = 1e-4,
        smoothness: float = FIT_DEFAULTS["smoothness"],
        num_restarts: int = 2,
        max_iterations: int = 500,
        tolerance: float = 1e-5,
        sample_weight: ArrayLike | Tensor | None = None,
        progress: bool = False,
        seed: int = 0,
    ) -> KhronosClassificationFit:
        r"""Minimises cross-entropy and a penalty in float64 on all points, by L-BFGS from random starts.

        .. math::
            -\frac{1}{W} \sum_p w_p \log \mathrm{softmax}(z(x_p))_{l_p} + \lambda \sum_o \|z_o - b_o\|_H^2

        with the norm of :mod:`sna_core.als`.

        Args:
            x: Points (points, num_inputs) in the box.
            labels: l, integers from 0 to num_labels - 1, (points,).
            ridge: :math:`\lambda`.
            smoothness: :math:`\theta` of the norm.
            num_restarts: Number of starts, of which the one that comes to the least objective is kept.
            max_iterations: Of each start, at most.
            tolerance: A start ends once no derivative of the objective is larger.
            sample_weight: w, (points,), not negative: a weight of two is the same as the point twice.
            progress: Whether to show a bar.
            seed: Of the starts.

        Raises:
            ValueError: If a value is not finite, a point lies outside the box, a label is none, a number is out of its
                range or shapes do not fit.
        """
        for name, value in (("ridge", ridge), ("smoothness", smoothness), ("tolerance", tolerance)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} = {value}; expected a number of at least 0.")
        for name, count in (("num_restarts", num_restarts), ("max_iterations", max_iterations)):
            if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
                raise ValueError(f"{name} = {count!r}; expected an integer of at least 1.")
        data = training_data(x, self._check_labels(labels), sample_weight, self.config.num_inputs, 1).distinct()
        check_points(data.x, self.network.splines, data.x.dtype)
        model = copy.deepcopy(self).to("cpu", torch.float64)  # type: ignore[arg-type]  # wrapped by transformers
        shares = data.y.new_ones(self.network.num_outputs).index_add_(0, data.y[:, 0].long(), data.weight)
        best: tuple[KhronosClassificationFit, dict[str, Tensor]] | None = None
        with torch.random.fork_rng(devices=[]), tqdm(total=num_restarts, unit=" starts", disable=not progress) as bar:
            torch.manual_seed(seed)
            for _ in range(num_restarts):
                model.network.reset_parameters()
                model.bias.data.copy_((shares / shares.sum()).log())
                result = _minimise(model, data, ridge, smoothness, max_iterations, tolerance)
                if best is None or result.objective < best[0].objective:
                    best = result, {name: value.clone() for name, value in model.state_dict().items()}
                bar.update()
        assert best is not None, "there is a start"
        self.load_state_dict(best[1])
        return best[0]

    def _check_labels(self, labels: ArrayLike | Tensor) -> Tensor:
        labels = as_tensor("labels", labels)
        right = (labels >= 0) & (labels < self.network.num_outputs) & (labels == labels.floor())
        if not right.all():
            index = (~right).nonzero()[0].tolist()
            raise ValueError(
                f"labels{index} = {labels[tuple(index)].item():g}; expected integers from 0 to "
                f"{self.network.num_outputs - 1}."
            )
        return labels


def _minimise(
    model: KhronosForClassification,
    data: TrainingData,
    ridge: float,
    smoothness: float,
    max_iterations: int,
    tolerance: float,
) -> KhronosClassificationFit:
    """Takes a model in float64 to a local minimum."""
    splines = model.network.splines
    norm = torch.linalg.cholesky(smoothness_matrix(splines[0], smoothness))
    # In the coordinates u = L^T alpha, with L L^T the norm's matrix, the norm is that of Euclid: far fewer iterations.
    # The start is a constant and smooth functions of the size of the network's own start.
    ones = norm.mT.sum(-1, keepdim=True)
    draws = torch.randn(model.network.factors.flatten(2).shape, dtype=torch.float64) / len(splines) ** 0.5
    whitened = (ones + draws).requires_grad_()
    weights, bias = model.network.weights, model.bias
    assert weights is not None, "shared components have weights"
    parts = [t.split(ROWS_AT_ONCE) for t in (data.x.double(), data.y[:, 0].long(), data.weight)]
    total_weight = data.weight.sum()

    def factors() -> Tensor:
        return torch.linalg.solve_triangular(norm.mT, whitened, upper=True)  # (num_inputs, num_basis, rank)

    def penalty() -> Tensor:
        return ridge * ((weights @ pairwise_product(whitened.mT @ whitened)) * weights).sum()

    def data_terms(alpha: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each part of the points the cross-entropy and the weight of the right answers, over the total weight."""
        for x, labels, weight in zip(*parts, strict=True):
            logits = bias + F.linear(pairwise_product(local_sum(x, alpha, splines, check=False)), weights)
            loss = F.cross_entropy(logits, labels, reduction="none") @ weight
            yield loss / total_weight, weight[logits.argmax(-1) == labels].sum() / total_weight

    optimizer = torch.optim.LBFGS(
        [whitened, weights, bias],
        max_iter=max_iterations,
        max_eval=10 * max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=SMALLEST_CHANGE,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = penalty()
        total.backward()
        for loss, _ in data_terms(factors()):  # a graph for one part at a time
            loss.backward()
            total = total.detach() + loss.detach()
        return total

    optimizer.step(closure)
    num_iterations = optimizer.state[whitened]["n_iter"]
    with torch.no_grad():
        model.network.factors.copy_(factors().unsqueeze(2))
        loss, right = (sum(terms).item() for terms in zip(*data_terms(factors()), strict=True))
        return KhronosClassificationFit(
            converged=num_iterations < max_iterations,
            num_iterations=num_iterations,
            objective=loss + penalty().item(),
            cross_entropy=loss,
            accuracy=right,
        )


__all__ = ["KhronosClassificationFit", "KhronosClassifierOutput", "KhronosForClassification"]
