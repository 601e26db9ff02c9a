"""The type of settings that may be left out, and that their configuration then fills in."""

from typing import TYPE_CHECKING, Any, Optional, TypeAlias, TypeVar

Setting = TypeVar("Setting")

if TYPE_CHECKING:
    Completed: TypeAlias = Setting | Any  # who reads one finds the value that is there; who writes one may give None
else:
    Completed = Optional

__all__ = ["Completed"]
