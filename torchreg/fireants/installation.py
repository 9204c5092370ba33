"""An installed FireANTs that computes with the kernels of this package."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from torchreg.fireants.interpolator import fireants_interpolator
from torchreg.fireants.losses.fusedcc import correlation
from torchreg.fireants.losses.fusedmi import information

__all__ = ["install", "uninstall"]

Method = Callable[..., Any]
Place = tuple[type, str]


def resampling(name: str) -> Callable[[Method], Method]:
    """What stands in for a method of FireANTs' interpolator: the one of this name of ours."""
    ours = getattr(fireants_interpolator, name)
    parameters = inspect.signature(ours).parameters.values()
    known = {parameter.name for parameter in parameters}
    in_order = sum(parameter.kind is not parameter.KEYWORD_ONLY for parameter in parameters)

    def standing_in_for(original: Method) -> Method:
        def method(self: object, *positional: Any, **named: Any) -> Any:
            given = {key: x for key, x in named.items() if x is not None or key in known}
            offered = len(positional) <= in_order and given.keys() <= known
            if offered and given.get("mode", "bilinear") in ("bilinear", "nearest"):
                return ours(*positional, **given)
            return original(self, *positional, **named)

        return method

    return standing_in_for


def shared_among_processes() -> bool:
    """Whether FireANTs has split an image, so that a loss is to be put together from parts."""
    state = sys.modules.get("fireants.registration.distributed.parallel_state")
    return state is not None and bool(state.is_initialized())


def local_correlation(original: Method, *, fused: bool) -> Method:
    """What stands in for ``forward`` of FireANTs' local cross-correlations."""

    def forward(self: Any, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        known = self.kernel_type in ("rectangular", "gaussian") and getattr(self, "unsigned", True)
        if not known or shared_among_processes():
            result: torch.Tensor = original(self, pred, target)
            return result
        # The fused one keeps what it adds times the voxels of a window.
        voxels = self.kernel_size ** (pred.ndim - 2) if fused else 1
        return correlation(
            pred,
            target,
            kernel_size=self.kernel_size,
            kernel_type=self.kernel_type,
            sigma=self.sigma if fused else None,
            smooth_nr=self.smooth_nr / voxels,
            smooth_dr=self.smooth_dr / voxels,
            reduction=self.masked_reduction if self.masked else self.reduction,
            masked=self.masked,
            mask_mode=self.mask_mode,
        )

    return forward


def mutual_information(original: Method, *, kernels: dict[Any, str]) -> Method:
    """What stands in for ``forward`` of FireANTs' mutual information."""

    def forward(self: Any, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        kernel = kernels.get(self.kernel_type)
        if kernel is None or shared_among_processes():
            result: torch.Tensor = original(self, pred, target)
            return result
        return information(
            pred,
            target,
            kernel_type=kernel,
            num_bins=self.num_bins,
            sigma_ratio=self.sigma_ratio,
            normalise=getattr(self, "normalize_image_if_required", True),
            smooth_nr=self.smooth_nr,
            smooth_dr=self.smooth_dr,
            reduction=self.masked_reduction if self.masked else self.reduction,
            masked=self.masked,
            mask_mode=self.mask_mode,
        )

    return forward


def unexpected(what: str) -> ImportError:
    """What is raised where FireANTs is not as it was in the version that is known."""
    return ImportError(
        f"torchreg.fireants.install: expected {what}, as in FireANTs 1.5.0: this version cannot be "
        "made to use other kernels",
        name="fireants",
    )


def imported(name: str) -> ModuleType:
    """A module of FireANTs'."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == "fireants":
            message = "torchreg.fireants.install: the package fireants is not installed"
            raise ModuleNotFoundError(message, name="fireants") from None
        if error.name == name:
            raise unexpected(f"a module {name}") from None
        raise


def named(name: str, module: ModuleType) -> Any:
    """What has a name in a module of FireANTs'."""
    if not hasattr(module, name):
        raise unexpected(f"{name} in {module.__name__}")
    return getattr(module, name)


MASKS = {"masked", "mask_mode", "masked_reduction"}
SMOOTHING = {"smooth_nr", "smooth_dr", "reduction", *MASKS}
CORRELATION = {"kernel_type", "kernel_size", *SMOOTHING}
INFORMATION = {"kernel_type", "num_bins", "sigma_ratio", *SMOOTHING}


def loss(name: str, module: ModuleType, attributes: set[str]) -> type[torch.nn.Module]:
    """A class of losses of FireANTs', whose instances have these attributes."""
    found: type[torch.nn.Module] = named(name, module)
    missing = sorted(attributes - set(dir(found())))
    if missing or "forward" not in vars(found):
        raise unexpected(f"{', '.join(missing) or 'forward'} in {name}")
    return found


def replacements() -> Iterator[tuple[Place, Method]]:
    """The methods of classes of FireANTs' that are replaced, with what replaces them."""
    imported("fireants")
    interpolator = type(named("fireants_interpolator", imported("fireants.interpolator")))
    for name in ("__call__", "warp_composer", "affine_warp"):
        if name not in vars(interpolator):
            raise unexpected(f"{name} in fireants_interpolator")
        yield (interpolator, name), resampling(name)(getattr(interpolator, name))

    module = imported("fireants.losses.cc")
    plain = loss("LocalNormalizedCrossCorrelationLoss", module, CORRELATION)
    yield (plain, "forward"), local_correlation(plain.forward, fused=False)
    module = imported("fireants.losses.mi")
    plain = loss("GlobalMutualInformationLoss", module, INFORMATION)
    kernels: dict[Any, str] = {name: name for name in KERNELS}
    yield (plain, "forward"), mutual_information(plain.forward, kernels=kernels)

    try:
        modules = [importlib.import_module(f"fireants.losses.{name}") for name in FUSED]
    except ImportError:
        return  # FireANTs' own kernels are not installed, and it does without
    fused = loss("FusedLocalNormalizedCrossCorrelationLoss", modules[0], CORRELATION | {"sigma"})
    yield (fused, "forward"), local_correlation(fused.forward, fused=True)
    fused = loss("FusedGlobalMutualInformationLoss", modules[1], INFORMATION)
    known = named("kernel_type_dict", modules[1])
    kernels = {known[name]: name for name in KERNELS if name in known}
    yield (fused, "forward"), mutual_information(fused.forward, kernels=kernels)


FUSED = ("fusedcc", "fusedmi")
KERNELS = ("gaussian", "b-spline", "delta")

replaced: dict[Place, Method] = {}


def install() -> contextlib.AbstractContextManager[object]:
    """Make an installed FireANTs sample, compose and compare with the kernels of this package.

    From then on its registrations, of whichever class, call these kernels: methods of its
    interpolator and of its losses are replaced, so that it does not matter who has imported what,
    or made which object, before. What is not offered here goes to FireANTs' own method: other modes
    of interpolation, triangular windows, signed correlations, images that are split among
    processes. Its optimisers and smoothing stay as they are. To install again changes nothing.

    Returns
    -------
    context manager
        ``with install(): ...`` ends with :func:`uninstall`, unless all was installed before.

    Raises
    ------
    ModuleNotFoundError
        There is no package ``fireants``.
    ImportError
        It is not as in version 1.5.0; nothing has been replaced.

    Notes
    -----
    Samples and compositions agree with FireANTs' to rounding, and so does mutual information with
    Gaussian windows of images within [0, 1], with neither option of FireANTs' to approximate; for
    what differs in losses see :class:`FusedLocalNormalizedCrossCorrelationLoss` and
    :class:`FusedGlobalMutualInformationLoss`.
    """
    undo = contextlib.ExitStack()
    if not replaced:
        found = dict(replacements())
        for (owner, name), method in found.items():
            replaced[owner, name] = getattr(owner, name)
            setattr(owner, name, method)
        undo.callback(uninstall)
    return undo


def uninstall() -> None:
    """Give FireANTs back the methods that :func:`install` replaced, if it did."""
    while replaced:
        (owner, name), method = replaced.popitem()
        setattr(owner, name, method)
