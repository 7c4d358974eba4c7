"""Hooks that stay behind: a copy of a watched model, by deepcopy, pickle or ``torch.save``, is the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["Hook", "leave_no_trace"]

_TABLES = ("_forward_pre_hooks", "_forward_hooks")


class Hook:
    """A hook of a module; in a copy of the module it does nothing.

    Args:
        function: what is called.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function: Callable[..., Any] | None = function

    def __call__(self, *args: Any) -> Any:
        """Call the function; in a copy of the module, return None."""
        return None if self._function is None else self._function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return _idle()

    def __reduce__(self) -> tuple[Callable[[], Hook], tuple[()]]:
        return _idle, ()

    @property
    def idle(self) -> bool:
        """True in a copy."""
        return self._function is None


def leave_no_trace(model: nn.Module, name: str, value: Any, *children: str) -> Callable[[], None]:
    """Keep a value on a model of which copies know nothing, nor of hooks of the class :class:`Hook`.

    Parts of the model, copied alone, keep hooks that do nothing.

    Args:
        model: the model.
        name: name of the value in the model's own dictionary.
        value: any value.
        children: names of child modules that copies are without too.

    Returns:
        A function that takes the value away.
    """
    own: dict[str, Any] = {
        name: value,
        "__deepcopy__": lambda memo: _bare(model, memo, own, children),
        # What pickle asks for: the bare copy shares its tensors with the model, so that none is held twice.
        "__reduce_ex__": lambda protocol: _bare(model, _tensors(model), own, children).__reduce_ex__(protocol),
    }
    model.__dict__.update(own)

    def end() -> None:
        for key in own:
            model.__dict__.pop(key, None)

    return end


def _bare(model: nn.Module, memo: dict[int, Any], own: dict[str, Any], children: tuple[str, ...]) -> nn.Module:
    for key in own:
        model.__dict__.pop(key)
    try:
        copied = copy.deepcopy(model, memo)
    finally:
        model.__dict__.update(own)
    for child in children:
        copied._modules.pop(child, None)
    for module in copied.modules():
        for table in _TABLES:
            hooks = getattr(module, table)
            for number in [number for number, hook in hooks.items() if isinstance(hook, Hook) and hook.idle]:
                del hooks[number]
                getattr(module, f"{table}_with_kwargs").pop(number, None)
    return copied


def _tensors(model: nn.Module) -> dict[int, Any]:
    """A memo of deepcopy with which a model's tensors are not copied."""
    shared: list[Tensor] = [*model.parameters(), *model.buffers()]
    return {id(tensor): tensor for tensor in shared}


def _idle() -> Hook:
    hook = Hook.__new__(Hook)
    hook._function = None
    return hook
