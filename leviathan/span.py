"""SPAN: a dense layer that finds coordinates in which a function is separable, and a CP network of splines in them."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from leviathan.sizes import MOST_MODULES, check_extra, check_sizes, check_weights
from sna_core.latent import LatentBlock, LatentComponents


@strict
class SpanConfig(PreTrainedConfig):
    r"""The size of a SPAN and of its splines.

    .. math::
        f(x) = V g(x) + v_0, \qquad g_j(x) = \prod_{i=1}^{d} \psi_{ij}(\sigma(W x + v)_i)

    Args:
        num_inputs: Number of inputs, any real numbers, best of order one.
        num_outputs: Number of functions, which share the components.
        latent_dim: Number d of learned coordinates.
        rank: Number of components g_j.
        num_cells: Cells of each coordinate's interval [0, 1].
        degree: Degree of the B-splines, 0 to 5.
        num_blocks: Dense layers and products on top of one another.
        normalization: ``"layer"`` gives the coordinates of a sample mean 0 and variance 1 before the logistic function,
            with a learned gain; None leaves them.
        learn_knot_scale: Whether the distance of the knots is learned, for each coordinate.
        initialization: Of the splines: ``"smooth"``, straight lines, or ``"rough"``, random coefficients.

    Raises:
        ValueError: If a count is below 1 or the degree is none.

    ```python
    >>> from leviathan import SpanConfig, SpanModel

    >>> model = SpanModel(SpanConfig(num_inputs=4, num_outputs=2, latent_dim=6, rank=8, num_cells=8))
    ```
    """

    model_type = "span"

    num_inputs: int = 1
    num_outputs: int = 1
    latent_dim: int = 6
    rank: int = 8
    num_cells: int = 8
    degree: int = 2
    num_blocks: int = 1
    normalization: Literal["layer"] | None = None
    learn_knot_scale: bool = False
    initialization: Literal["smooth", "rough"] = "smooth"

    def __post_init__(self, **kwargs: Any) -> None:
        check_extra(self, kwargs)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation. Validates the architecture of the config."""
        check_sizes(self, "num_inputs", "num_outputs", "latent_dim", "rank", "num_cells")
        check_sizes(self, "num_blocks", most=MOST_MODULES)
        check_weights(latent_dim=self.latent_dim, rank=self.rank, num_basis=self.num_cells + self.degree)
        check_weights(latent_dim=self.latent_dim, num_inputs=self.num_inputs)
        check_weights(num_outputs=self.num_outputs, rank=self.rank)
        if self.num_outputs < 1:
            raise ValueError(f"num_outputs = {self.num_outputs}; expected at least 1.")
        with torch.device("meta"):  # neither takes memory nor draws numbers
            self.build_components()

    def build_components(self, num_networks: int = 1) -> LatentComponents:
        """All but the read-out, with parameters drawn anew; several networks are evaluated together."""
        return LatentComponents(
            self.num_inputs,
            latent_dim=self.latent_dim,
            rank=self.rank,
            num_cells=self.num_cells,
            degree=self.degree,
            num_blocks=self.num_blocks,
            num_networks=num_networks,
            normalization=self.normalization,
            learn_knot_scale=self.learn_knot_scale,
            initialization=self.initialization,
        )


@dataclass
class SpanOutput(ModelOutput):
    """What [`SpanModel`] returns.

    Args:
        loss: Mean squared error against the labels, where labels were given.
        prediction: (..., num_outputs).
    """

    loss: torch.Tensor | None = None
    prediction: torch.Tensor | None = None


class SpanModel(PreTrainedModel):
    """A SPAN that is saved, loaded and trained as transformers' models are.

    Source: arXiv 2603.12244, Discussion, and 2601.23225.
    """

    config: SpanConfig
    base_model_prefix = "span"
    main_input_name = "x"
    _no_split_modules = ["LatentBlock"]

    def __init__(self, config: SpanConfig):
        super().__init__(config)
        self.components = config.build_components()
        self.readout = nn.Linear(config.rank, config.num_outputs)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LatentBlock | nn.Linear):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None, fused: bool = True) -> SpanOutput:
        """Evaluates the function, and the mean squared error where labels are given.

        Args:
            x: Points (..., num_inputs).
            labels: Values to predict, (..., num_outputs).
            fused: Whether the product is one node of the graph. It can then be differentiated once; set it to False
                for second derivatives.

        Raises:
            ValueError: If a point is not finite, or a shape does not fit.
        """
        if x.shape[-1:] != (self.config.num_inputs,):
            raise ValueError(f"x has shape {tuple(x.shape)}; expected (..., {self.config.num_inputs}).")
        if not torch.compiler.is_compiling() and not (finite := x.isfinite()).all():
            index = (~finite).nonzero()[0].tolist()
            raise ValueError(f"x{index} = {x[tuple(index)]:g}; expected finite numbers: drop the sample or fill it in.")
        prediction = self.readout(self.components(x, fused=fused)[0])
        if labels is None:
            return SpanOutput(prediction=prediction)
        if labels.shape != prediction.shape:
            raise ValueError(f"labels have shape {tuple(labels.shape)}; expected {tuple(prediction.shape)}.")
        return SpanOutput(loss=F.mse_loss(prediction, labels), prediction=prediction)


__all__ = ["SpanConfig", "SpanModel", "SpanOutput"]
