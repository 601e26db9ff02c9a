"""Operators from one state of a field to the next: the baselines that a model of tokens is held against.

Three are deterministic (FNO, U-Net, DeepONet), one draws samples (a diffusion). All read a window of a field, the patch
and `margin` pixels around it, and answer with the patch at the next time; whole periodic fields are a patch of their
own. They are transformers' models: trained by its Trainer, kept as safetensors with their normalisation in the config.
"""

import bisect
import contextlib
import functools
import itertools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from leviathan.tokenization_leviathan import check_scale, stitch, to_windows
from training.operator_networks import DOMAIN_PADDING, NUM_GROUPS, NUM_RESOLUTIONS, DeepONet, build_fno, build_unet

Architecture = Literal["fno", "unet", "deeponet", "diffusion"]
NUM_LAYERS = {"fno": 4, "unet": 2, "deeponet": 3, "diffusion": 2}
U_NETS = ("unet", "diffusion")
MAX_MODES = 12  # those of the first published FNO of turbulence, where the side has room for them
# Of a second size, in its own steps, tried in turn where the width alone is too coarse.
SHIFTS = (0, *itertools.chain.from_iterable((n, -n) for n in range(1, 7)))


@strict
class OperatorConfig(PreTrainedConfig):
    r"""Sizes of an operator on fields, and the normalisation :math:`(u - mean) / std` of what it reads and writes.

    Args:
        architecture: ``"fno"``, ``"unet"``, ``"deeponet"`` or ``"diffusion"``.
        patch_size: Side P of the next state, in pixels; of whole fields, their side.
        margin: Pixels around it that the prior state covers too.
        periodic: Whether the fields are whole and periodic.
        width: Channels, or units; see `training.operator_networks`.
        bottom_width: Channels at a U-Net's lowest resolution; None is four times the width.
        num_layers: Fourier layers, residual blocks a resolution or hidden layers; None is the architecture's own.
        num_modes: Positive wavenumbers that an FNO keeps along an axis; None is as many as the side has room for, up to
            a usual number.
        num_diffusion_steps: Steps of a diffusion.
        predict_difference: Whether deterministic operators learn u(t + 1) - u(t) in place of u(t + 1).
        mean: Mean of the data, in the field's unit.
        std: Standard deviation of the data, in the field's unit.

    Raises:
        ValueError: If a size is out of range, or sizes do not fit each other.
    """

    model_type = "field_operator"

    architecture: Architecture = "fno"
    patch_size: int = 64
    margin: int = 0
    periodic: bool = False
    width: int = 32
    bottom_width: int | None = None
    num_layers: int | None = None
    num_modes: int | None = None
    num_diffusion_steps: int = 20
    predict_difference: bool = True
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self, **kwargs):
        if self.num_layers is None:
            self.num_layers = NUM_LAYERS.get(self.architecture)
        if self.bottom_width is None and self.architecture in U_NETS:
            self.bottom_width = 4 * self.width
        if self.num_modes is None and self.architecture == "fno":
            self.num_modes = min(MAX_MODES, self.window_size // 2)
        super().__post_init__(**kwargs)

    @property
    def window_size(self) -> int:
        """Side of the prior state: the patch and its margin."""
        return self.patch_size + 2 * self.margin

    @property
    def max_modes(self) -> int:
        """Positive wavenumbers of the field that an FNO's Fourier layers see."""
        rim = 0 if self.periodic else round(DOMAIN_PADDING * self.window_size)
        return self.window_size // 2 + rim

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation. Validates the sizes."""
        for name in ("patch_size", "width", "bottom_width", "num_layers", "num_modes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} = {value}; expected at least 1.")
        if self.margin < 0 or (self.margin and self.periodic):
            raise ValueError(f"margin = {self.margin}; expected 0 or more, and 0 where whole fields are periodic.")
        if not 0 < self.std < float("inf"):
            raise ValueError(f"std = {self.std}; expected a positive number.")
        side, coarsest = self.window_size, 2 ** (NUM_RESOLUTIONS - 1)
        if self.architecture == "fno":
            if side % 2:
                raise ValueError(f"an FNO reads an even number of pixels along an axis, not {side}.")
            if self.num_modes > self.max_modes:
                raise ValueError(
                    f"num_modes = {self.num_modes}; {side} pixels along an axis have room for {self.max_modes}."
                )
        if self.architecture in U_NETS:
            if side % coarsest:
                raise ValueError(
                    f"a U-Net of {NUM_RESOLUTIONS} resolutions reads a multiple of {coarsest} pixels along an axis, "
                    f"not {side}; change patch_size = {self.patch_size} or margin = {self.margin}."
                )
            if self.width % NUM_GROUPS or self.bottom_width % NUM_GROUPS:
                raise ValueError(
                    f"width = {self.width} and bottom_width = {self.bottom_width}; expected multiples of {NUM_GROUPS}."
                )
        if self.architecture == "diffusion" and self.num_diffusion_steps < 11:
            raise ValueError(f"num_diffusion_steps = {self.num_diffusion_steps}; its schedule needs 11 or more.")


@dataclass
class OperatorOutput(ModelOutput):
    """What an operator returns.

    Attributes:
        loss: Mean squared error in normalised units, or the denoising loss of a diffusion; None without a next state.
        prediction: Next states (batch, P, P), in the field's unit; None beside the loss of a diffusion.
    """

    loss: Tensor | None = None
    prediction: Tensor | None = None


def build_network(config: OperatorConfig) -> nn.Module:
    """The network of a config: (batch, channels, side, side) to the same, with an untrained start."""
    kind, side = config.architecture, config.window_size
    if kind == "fno":
        return build_fno(side, config.width, config.num_layers, config.num_modes, config.periodic)
    if kind == "deeponet":
        return DeepONet(side, config.width, config.num_layers, config.periodic)
    diffusion = kind == "diffusion"
    return build_unet(
        channels=2 if diffusion else 1,
        width=config.width,
        bottom_width=config.bottom_width,
        num_layers=config.num_layers,
        periodic=config.periodic,
        # Without a diffusion time is constant, and what embeds it no more than biases.
        time_width=4 * config.width if diffusion else NUM_GROUPS,
    )


class FieldOperator(PreTrainedModel):
    r"""The next state of a field from the one before it.

    Deterministic operators: :math:`\hat u(t + 1) = u(t) + N(u(t))`, or N alone, learned by its mean squared error.

    The diffusion is that of Kohl et al., 2023 (ACDM, arXiv 2309.01745): prior and next state are two channels that are
    diffused together, and the network learns to denoise both. To sample, the next state's channel is denoised step by
    step, while the prior state's is diffused to the same step. Here it predicts velocities (Salimans & Ho, 2022).
    """

    config_class = OperatorConfig
    base_model_prefix = "network"
    main_input_name = "fields"

    def __init__(self, config: OperatorConfig):
        super().__init__(config)
        self.network = build_network(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The libraries' networks come with a start of their own."""

    @functools.cached_property
    def scheduler(self) -> Any:
        """The noise of a diffusion: ACDM's linear schedule, rescaled to the number of steps."""
        from diffusers import DDPMScheduler

        steps = self.config.num_diffusion_steps
        return DDPMScheduler(
            steps,
            beta_start=1e-4 * 500 / steps,
            beta_end=2e-2 * 500 / steps,
            prediction_type="v_prediction",
            clip_sample=False,
        )

    def normalise(self, fields: Tensor) -> Tensor:
        """Normalised values with a channel: (batch, side, side) -> (batch, 1, side, side)."""
        return (fields[:, None] - self.config.mean) / self.config.std

    def denormalise(self, values: Tensor) -> Tensor:
        """Values in the field's unit: the inverse of :meth:`normalise`."""
        return values[:, 0].float() * self.config.std + self.config.mean

    def centre(self, windows: Tensor) -> Tensor:
        """The patches within windows: (..., W, W) -> (..., P, P)."""
        inside = slice(self.config.margin, self.config.margin + self.config.patch_size)
        return windows[..., inside, inside]

    def forward(
        self, fields: Tensor, next_fields: Tensor | None = None, generator: torch.Generator | None = None
    ) -> OperatorOutput:
        """Prediction and, with the true next states, the loss.

        Args:
            fields: Prior states (batch, W, W) with W = P + 2 margin, in the field's unit.
            next_fields: Next states (batch, P, P), in the field's unit.
            generator: Noise of a diffusion; None is the global one.
        """
        prior = self.normalise(fields)
        target = None if next_fields is None else self.normalise(next_fields)
        if self.config.architecture == "diffusion":
            if target is not None:
                return OperatorOutput(loss=self._denoising_loss(prior, target, generator))
            return OperatorOutput(prediction=self.denormalise(self._sample(prior, generator)))
        value = self.centre(self._run(prior))
        if self.config.predict_difference:
            value = value + self.centre(prior)
        loss = None if target is None else F.mse_loss(value, target)
        return OperatorOutput(loss=loss, prediction=self.denormalise(value))

    @torch.no_grad()
    def predict(self, fields: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Next states: (batch, W, W) -> (batch, P, P), in the field's unit; of a diffusion one sample each."""
        return self(fields, generator=generator).prediction

    def _run(self, values: Tensor, time: Tensor | int = 0) -> Tensor:
        if self.config.architecture in U_NETS:
            return self.network(values, time).sample
        # There is no Fourier transform of half precision.
        whole = torch.autocast(values.device.type, enabled=False) if self.config.architecture == "fno" else None
        with whole or contextlib.nullcontext():
            return self.network(values)

    def _denoising_loss(self, prior: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        times = _drawn(torch.randint, (self.config.num_diffusion_steps, (len(prior),)), generator, prior.device)
        states = [prior, target]
        noises = [_drawn(torch.randn, (state.shape,), generator, prior.device) for state in states]
        noisy = [self.scheduler.add_noise(*pair, times) for pair in zip(states, noises, strict=True)]
        velocities = [self.scheduler.get_velocity(*pair, times) for pair in zip(states, noises, strict=True)]
        found = self._run(torch.cat([noisy[0], self._widen(noisy[1])], dim=1), times)
        losses = [F.mse_loss(found[:, :1], velocities[0]), F.mse_loss(self.centre(found[:, 1:]), velocities[1])]
        return torch.stack(losses).mean()

    def _sample(self, prior: Tensor, generator: torch.Generator | None) -> Tensor:
        noise = _drawn(torch.randn, (prior.shape,), generator, prior.device)
        value = _drawn(torch.randn, (self.centre(prior).shape,), generator, prior.device)
        for time in self.scheduler.timesteps.tolist():
            noisy = self.scheduler.add_noise(prior, noise, torch.full((len(prior),), time))
            velocity = self._run(torch.cat([noisy, self._widen(value)], dim=1), time)[:, 1:].float()
            value = self.scheduler.step(self.centre(velocity), time, value, generator).prev_sample
        return value

    def _widen(self, patches: Tensor) -> Tensor:
        return F.pad(patches, [self.config.margin] * 4)  # nothing is known of the next state around the patch


def _drawn(draw: Any, arguments: tuple, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Random numbers of a generator that may be of another device, so that a seed means the same on every one."""
    return draw(*arguments, generator=generator, device=generator.device if generator else device).to(device)


def count_parameters(network: nn.Module) -> int:
    """Trainable real numbers: a complex parameter, as in Fourier layers, is two."""
    return sum(p.numel() * (2 if p.is_complex() else 1) for p in network.parameters())


def fit_width(config: OperatorConfig, num_parameters: int, tolerance: float = 0.05) -> OperatorConfig:
    """The config with the width at which the model has ``num_parameters``, as :func:`count_parameters` counts them.

    Where widths are too coarse, a second size changes by as little as it takes: the modes of an FNO, the channels at a
    U-Net's lowest resolution. Allocates nothing.

    Raises:
        ValueError: If no model comes within ``tolerance``, as a share; it names the nearest counts.
    """
    nearest: dict[int, OperatorConfig] = {}
    for shift in (0,) if config.architecture == "deeponet" else SHIFTS:
        if config.architecture == "fno" and not 1 <= config.num_modes + shift <= config.max_modes:
            continue
        resized = functools.partial(_resized, config, shift)
        count = functools.cache(lambda place, resized=resized: _count(resized(place)))
        high = 1
        while count(high) < num_parameters:
            high *= 2
        above = bisect.bisect_left(range(high + 1), num_parameters, lo=max(1, high // 2), key=count)
        nearest |= {count(place): resized(place) for place in {max(1, above - 1), above}}
        best = min(nearest, key=lambda count: abs(count - num_parameters))
        if abs(best - num_parameters) <= tolerance * num_parameters:
            return nearest[best]
    found = " and ".join(f"{count:,}" for count in sorted(nearest, key=lambda n: abs(n - num_parameters))[:2])
    raise ValueError(
        f"no {config.architecture} of {config.num_layers} layers comes within {tolerance:.0%} of num_parameters = "
        f"{num_parameters:,}; the nearest have {found}. Ask for one of these, or change num_layers."
    )


def _resized(config: OperatorConfig, shift: int, place: int) -> OperatorConfig:
    """The config with the ``place``-th width, counted from 1, and the second size shifted by so many of its steps."""
    sizes = {"width": place}
    if config.architecture in U_NETS:
        width = NUM_GROUPS * place
        sizes = {"width": width, "bottom_width": max(NUM_GROUPS, 4 * width + NUM_GROUPS * shift)}
    elif config.architecture == "fno":
        sizes = {"width": 1 + place, "num_modes": config.num_modes + shift}  # of one channel, its layers have none
    return OperatorConfig(**config.to_dict() | sizes)


def _count(config: OperatorConfig) -> int:
    with torch.device("meta"):
        return count_parameters(build_network(config))


@torch.no_grad()
def rollout_fields(
    model: FieldOperator,
    fields: np.ndarray | Tensor,
    num_steps: int,
    seed: int | None = None,
    batch_size: int = 256,
    progress: bool = True,
) -> Tensor:
    """Free rollout of fields: each state is predicted from the one predicted before it.

    A field is cut into windows, all of them are stepped, and the patches put together again: without a margin each is a
    stream of its own, with one they hear of each other at every step.

    Args:
        model: The operator.
        fields: Initial states (batch, height, width), in the field's unit; sides multiples of the patch, and for a
            model of whole fields the patch itself.
        num_steps: T, states to predict.
        seed: Seeds the samples of a diffusion, which depend on ``batch_size`` too; None is the global generator.
        batch_size: Windows in one forward pass.
        progress: Show a progress bar.

    Returns:
        (batch, T, height, width) float32 on the CPU, in the field's unit.

    Raises:
        ValueError: On fields of a size that the model cannot read, of another normalisation, or not finite.
    """
    states = torch.as_tensor(fields, dtype=torch.float32)
    config = model.config
    _check_fields(config, states, num_steps, batch_size)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    found = []
    try:
        for _ in tqdm(range(num_steps), desc="rollout", disable=not progress):
            windows = to_windows(states, config.patch_size, config.margin)
            patches = [model.predict(part.to(model.device), generator).cpu() for part in windows.split(batch_size)]
            states = stitch(torch.cat(patches), tuple(states.shape[1:]))
            found.append(states)
    finally:
        model.train(was_training)
    return torch.stack(found, dim=1)


def _check_fields(config: OperatorConfig, fields: Tensor, num_steps: int, batch_size: int) -> None:
    for name, value in (("num_steps", num_steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} = {value}; expected at least 1.")
    if fields.ndim != 3 or not fields.numel():
        raise ValueError(f"fields have shape {tuple(fields.shape)}; expected (batch, height, width), not empty.")
    if not fields.isfinite().all():
        raise ValueError("the fields are not finite everywhere; leave out the broken ones.")
    size = config.patch_size
    if config.periodic and tuple(fields.shape[1:]) != (size, size):
        raise ValueError(
            f"fields of {fields.shape[1]} x {fields.shape[2]} for a model of whole periodic fields of {size} x {size}; "
            "give it whole fields of its grid, or use a model of patches."
        )
    check_scale(fields, (config.mean**2 + config.std**2) ** 0.5)


__all__ = [
    "Architecture",
    "FieldOperator",
    "OperatorConfig",
    "OperatorOutput",
    "build_network",
    "count_parameters",
    "fit_width",
    "rollout_fields",
]
