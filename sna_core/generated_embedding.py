"""What embeddings without a stored table share: a lookup by generation, and a baked table for inference."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MATERIALIZED_AT_ONCE = 8192  # rows, whose intermediate numbers are far more than the rows themselves
_Versions = tuple[tuple[Tensor, int, int], ...]


class GeneratedEmbedding(nn.Module):
    """What the embeddings without a stored table share: a lookup by generation, and a baked table for inference.

    In ``eval()`` and without gradients an embedding is a constant of its id. A module there counts the rows that it
    generates, and before they would be more than the table has it bakes the table and becomes a plain lookup: at worst
    twice the work of whoever knew beforehand which of the two is cheaper. :meth:`bake` does it at once. In a group of
    several processes, where weights may be sharded, and in a compiled graph it does not bake by itself.

    A baked table is left behind when a parameter changes, and dropped by ``train()``, by a forward pass that learns,
    and by moves to another device or dtype; it is no part of the state dict or of copies. Writing into
    ``parameter.data`` in place (an average of weights swapped in, say) goes unseen: call :meth:`unbake` after it.
    """

    num_embeddings: int
    embedding_dim: int
    _baked: tuple[_Versions, Tensor] | None = None
    _counted: tuple[_Versions, int] = ((), 0)

    def reset_parameters(self) -> None:
        """Draws the parameters anew."""
        raise NotImplementedError

    def generate(self, ids: Tensor) -> Tensor:
        """Embeddings of a flat tensor of ids: (tokens,) -> (tokens, embedding_dim)."""
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings of integer ``ids``: (...) -> (..., embedding_dim).

        Raises:
            ValueError: If ``ids`` are not integers.
            IndexError: If an id lies outside ``[0, num_embeddings)``, as ``torch.nn.Embedding``; not checked in a
                compiled graph, nor by a baked table on a GPU.
        """
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"ids have dtype {ids.dtype}; expected integers.")
        ids = ids.long()
        if (table := self._baked_table()) is not None:
            return F.embedding(ids, table)
        flat = ids.reshape(-1)
        if _is_static(flat):  # the table, or every token on its own
            if flat.numel() >= self.num_embeddings:
                return F.embedding(ids, self.generate(self._all_ids()))
            return self.generate(flat).view(*ids.shape, self.embedding_dim)
        distinct, inverse = flat.unique(return_inverse=True)  # sorted; an embedding depends on its id alone
        if flat.numel() and not (distinct[0] >= 0 and distinct[-1] < self.num_embeddings):
            wrong = int(distinct[0] if distinct[0] < 0 else distinct[-1])
            raise IndexError(f"id {wrong} lies outside [0, num_embeddings = {self.num_embeddings}).")
        if self._is_constant() and self._is_worth_baking(distinct.numel()):
            return F.embedding(ids, self._bake())
        return F.embedding(inverse.view(ids.shape), self.generate(distinct))

    def table(self) -> Tensor:
        """The whole table (num_embeddings, embedding_dim), differentiable; the baked one where nothing is learned."""
        if self._is_constant() and not _is_grouped():
            return self._bake()
        return self.generate(self._all_ids())

    @torch.no_grad()
    def materialize(self) -> Tensor:
        """A new table without gradient, for inference as a plain lookup: (num_embeddings, embedding_dim)."""
        if (table := self._baked_table()) is not None:
            return table.clone()
        ids = self._all_ids()
        with without_autocast(ids.device):  # a table outlives it
            return torch.cat([self.generate(each) for each in ids.split(MATERIALIZED_AT_ONCE)])

    @property
    @torch.no_grad()
    def weight(self) -> Tensor:
        """The generated table, read-only: what ``torch.nn.Embedding.weight`` is to tools that only read it."""
        table = self._baked_table()
        return self.materialize() if table is None else table

    @property
    def is_baked(self) -> bool:
        """Whether the next lookup reads a baked table."""
        return self._baked_table() is not None

    def bake(self) -> Self:
        """Generates the table now, for all lookups in ``eval()`` without gradients until a parameter changes.

        Raises:
            RuntimeError: In training, where it would be out of date at the next step.
        """
        if self.training:
            raise RuntimeError("a table baked in training is out of date at the next step; call eval() first.")
        self._bake()
        return self

    def unbake(self) -> Self:
        """Frees the baked table."""
        self._baked, self._counted = None, ((), 0)
        return self

    def train(self, mode: bool = True) -> Self:
        """As in ``torch.nn.Module``; training drops the baked table."""
        if mode:
            self.unbake()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_baked", "_counted")}

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.unbake()
        return super()._apply(*args, **kwargs)

    def _weights(self) -> list[Tensor]:
        """What embeddings are made of; parametrizations and adapters put theirs into modules below."""
        if not self._modules:
            return [w for w in (*self._parameters.values(), *self._buffers.values()) if w is not None]
        return [*self.parameters(), *self.buffers()]

    def _is_constant(self) -> bool:
        """Whether nothing is learned here, nor traced by a compiler, which would keep a table for ever."""
        if self.training or torch.compiler.is_compiling():
            return False
        weights = self._weights()
        if torch.is_grad_enabled() and any(w.requires_grad for w in weights):
            self.unbake()  # an optimizer may follow whose kernels change weights unseen, as fused ones do
            return False
        parameter = next(self.parameters(), None)  # a replica of DataParallel has none
        return parameter is not None and not parameter.is_meta

    def _baked_table(self) -> Tensor | None:
        """The table, if there is one that holds. On the way of every lookup: one loop, and no more."""
        baked = self._baked  # one read, since other threads may drop it
        if baked is None or self.training or torch.compiler.is_compiling():
            return None
        versions, table = baked
        learns, weights = torch.is_grad_enabled(), self._weights()
        if len(weights) != len(versions):
            return None
        for now, (weight, version, pointer) in zip(weights, versions, strict=True):
            if now is not weight or now._version != version or now.data_ptr() != pointer:
                return None
            if learns and now.requires_grad:
                self.unbake()  # as above
                return None
        return table

    def _bake(self) -> Tensor:
        table = self._baked_table()
        if table is None:
            with torch.inference_mode(False):
                table = self.materialize()
            versions = _versions(self._weights())
            self._baked = None if versions is None else (versions, table)
        return table

    def _is_worth_baking(self, num_rows: int) -> bool:
        """Counts rows that are to be generated: whether with them there would be as many as the table has."""
        versions, (before, counted) = _versions(self._weights()), self._counted
        if versions is None or _is_grouped():
            return False
        same = len(before) == len(versions) and all(
            a[0] is b[0] and a[1:] == b[1:] for a, b in zip(before, versions, strict=True)
        )
        num_rows += counted if same else 0
        self._counted = versions, num_rows
        return num_rows >= self.num_embeddings

    def _all_ids(self) -> Tensor:
        return torch.arange(self.num_embeddings, device=next(self.parameters()).device)


def _versions(weights: list[Tensor]) -> _Versions | None:
    """What tells whether weights change: in place by their version, as others by themselves or their memory.

    None where nothing tells: inference tensors have no version, sharded ones no memory of their own.
    """
    if any(type(w) not in (nn.Parameter, Tensor) or w.is_inference() for w in weights):
        return None
    return tuple((w, w._version, w.data_ptr()) for w in weights)


def _is_static(ids: Tensor) -> bool:
    """Whether shapes must not depend on the ids: in a compiled graph, a CUDA graph and without data."""
    capturing = ids.is_cuda and torch.cuda.is_current_stream_capturing()
    return capturing or ids.is_meta or torch.compiler.is_compiling()


def _is_grouped() -> bool:
    """Whether several processes work together, and weights may be sharded behind a module's back."""
    group = torch.distributed
    return group.is_available() and group.is_initialized() and group.get_world_size() > 1


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Turns autocast off, as products of many factors demand."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a product or a softmax over parameters of ``dtype``: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


__all__ = ["GeneratedEmbedding", "product_dtype", "without_autocast"]
