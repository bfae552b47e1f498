"""Plain Flax models from models of parametrised layers."""

from typing import Any

from flax import nnx

from jaxcert.nn.frequency import BROConv, CayleyConv
from jaxcert.nn.parametrised import Parametrised
from jaxcert.nn.residual import CPLBlock, SandwichDense, SLLBlock


def freeze(model: nnx.Module) -> Any:
    """A copy of a model in which every parametrised layer is a plain one with its kernel stored.

    `AOLConv` becomes `nnx.Conv`, `CayleyDense` becomes `nnx.Linear`, residual and sandwich blocks
    keep the weights that they compute; outputs stay the same. For deployment, where a layer then
    costs what a plain one does, and for other certifiers. To train on, keep the original: the free
    weights are gone.

    Args:
      model: an NNX module. It is left as it is.

    Raises:
      TypeError: for anything but an NNX module, and for layers in the frequency domain, whose
        kernels are as large as their image.

    Example:
      >>> from flax import nnx
      >>> from jaxcert import nn
      >>> net = nnx.Sequential(nn.AOLDense(4, 8, rngs=nnx.Rngs(0)), nn.maxmin)
      >>> type(freeze(net).layers[0]).__name__
      'Linear'
    """
    if not isinstance(model, nnx.Module):
        kind = type(model)
        linen = any(base.__module__.startswith("flax.linen") for base in kind.__mro__)
        hint = (
            "wrap a Linen module with flax.nnx.bridge.ToNNX first"
            if linen
            else "pass the model itself, an nnx.Module"
        )
        raise TypeError(f"freeze takes an NNX module, got {kind.__name__}; {hint}")
    return _frozen(nnx.clone(model), "the model", {})


def _frozen(node: Any, place: str, seen: dict[int, Any]) -> Any:
    """A module with its parametrised layers replaced, each once however often it is shared."""
    if id(node) in seen:
        return seen[id(node)]
    if isinstance(node, CayleyConv | BROConv):
        raise TypeError(
            f"{place} is a {type(node).__name__}, whose kernel is as large as its image, so there "
            "is no plain layer for it; use AOCConv for an orthogonal convolution that can be frozen"
        )
    own = isinstance(node, Parametrised | SLLBlock | CPLBlock | SandwichDense)
    seen[id(node)] = result = node.frozen() if own else node
    if result is node:
        for name, child in list(nnx.iter_children(node)):
            if not isinstance(child, nnx.Module):
                continue
            frozen = _frozen(child, f"{place}.{name}", seen)
            if frozen is child:
                continue
            if isinstance(node, nnx.List) and isinstance(name, int):
                node[name] = frozen
            else:
                setattr(node, str(name), frozen)
    return result
