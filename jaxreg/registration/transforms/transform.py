"""The transform that a registration finds, and what can be done with it.

A transform maps points: to resample an image onto a grid, every voxel of the grid is sent through
the transform and the image is read where it arrives. So the transform that brings the moving image
to the fixed one maps the fixed space to the moving space.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxreg import compose, convert_displacement, invert_displacement
from jaxreg.registration.across import across
from jaxreg.registration.programs import Program
from jaxreg.registration.transforms.parts import (
    Step,
    chain_on,
    displacements,
    fields_of,
    matrix_of,
    rotate,
    turned,
)
from jaxreg.registration.transforms.resampling import Interpolation, Outside, resample
from regkernels import AffineMap, DisplacementField, Grid, Volume, move_points
from regkernels.grid import inverse_matrix
from regkernels.maps import Part, as_part

__all__ = ["Transform"]

_Field = jax.Array | NDArray[np.float32]

_PLANES = 1
"""The axis of the planes of a displacement."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transform:
    """Maps points of the fixed space to points of the moving space; a JAX pytree.

    A point goes through a diffeomorphism of the fixed space first, then through an affine:
    with ``x`` in normalised coordinates of `grid`, the moving image is sampled at ``A(x + d(x))``.
    Back, a point of the moving space goes through the inverse of ``A``, then through the inverse
    diffeomorphism ``y + e(y)``, which lives on the same grid.

    Attributes
    ----------
    grid
        The fixed grid.
    matrix
        ``A`` in physical space: ``(D + 1, D + 1)``, fixed -> moving, millimetres, LPS.
    displacement
        ``d``: ``(1, [Z,] Y, X, D)`` on the grid, normalised coordinates; `None`: no deformation.
    inverse_displacement
        ``e``, likewise; `None` where there is no deformation, or its inverse is not known.
    devices
        Which share the planes of the fields where something is computed with them; `None`: one does
        it.
    """

    grid: Grid
    matrix: Any
    displacement: Any = None
    inverse_displacement: Any = None
    devices: tuple[jax.Device, ...] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    @classmethod
    def from_parts(
        cls,
        grid: Grid,
        parts: Sequence[Part | ArrayLike],
        *,
        devices: Sequence[jax.Device] | None = None,
    ) -> Transform:
        """Return a chain of parts as one transform, without the inverse of its deformation.

        Parameters
        ----------
        grid
            The fixed grid.
        parts
            In the order in which a point goes through them; any number.
        devices
            Which share the planes of the fields; one by default.

        Returns
        -------
        Transform
            With the product of the matrices. What the displacement fields do is resampled on the
            grid; a field on this grid that comes first keeps its values.
        """
        chain = [as_part(part) for part in parts]
        shared = None if devices is None else tuple(devices)
        matrix, fields = matrix_of(chain, grid.ndim), fields_of(chain)
        if not fields:
            return cls(grid, matrix, devices=shared)

        on_grid = chain_on(chain, grid)
        to_normalised = _linear(inverse_matrix(grid.normalised_to_physical()))

        def displacement(*fields: jax.Array) -> jax.Array:
            is_on_grid, shape = on_grid.is_on_grid, grid.shape
            return _chained(
                fields, on_grid.steps, to_normalised, is_on_grid=is_on_grid, shape=shape
            )

        found = across(shared, displacement, fields, [0] * len(fields), _PLANES)
        return cls(grid, matrix, found, devices=shared)

    def with_inverse(self) -> Transform:
        """Return the same transform with the inverse of its deformation.

        It is computed by `jaxreg.invert_displacement`, to its default tolerance, 0.01 voxels;
        `inverse_residual` tells where that was not reached.
        """
        if self.displacement is None:
            return self
        inverse = self._computed(_inverted, self.displacement)
        return dataclasses.replace(self, inverse_displacement=inverse)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The deformation, if there is one, and the affine, as a point goes through them."""
        affine = AffineMap(np.asarray(self.matrix, dtype=np.float64))
        if self.displacement is None:
            return (affine,)
        return (DisplacementField(self.grid, self.displacement_field()), affine)

    @property
    def inverse_parts(self) -> tuple[Part, ...]:
        """The inverse affine and, if there is one, the inverse deformation.

        Raises
        ------
        ValueError
            If the inverse of the deformation is not known.
        """
        affine = AffineMap(inverse_matrix(self.matrix))
        if self.displacement is None:
            return (affine,)
        return (affine, DisplacementField(self.grid, self.inverse_displacement_field()))

    def transform_points(self, points: ArrayLike) -> NDArray[np.float64]:
        """Map points of the fixed space to the moving space.

        Parameters
        ----------
        points
            ``(..., D)``, millimetres, LPS. Outside of the fixed grid there is no deformation.

        Returns
        -------
        ndarray
            ``(..., D)``, millimetres, LPS.

        Raises
        ------
        ValueError
            If these are not finite points of D coordinates.
        """
        return move_points(points, self.parts)

    def inverse_transform_points(self, points: ArrayLike) -> NDArray[np.float64]:
        """Map points of the moving space back to the fixed space.

        Parameters
        ----------
        points
            ``(..., D)``, millimetres, LPS.

        Returns
        -------
        ndarray
            ``(..., D)``, millimetres, LPS.

        Raises
        ------
        ValueError
            If these are not finite points of D coordinates, or the inverse is not known.
        """
        return move_points(points, self.inverse_parts)

    def displacement_field(self, *, with_affine: bool = False) -> _Field:
        """Return the deformation as ITK reads it.

        Parameters
        ----------
        with_affine
            Return the whole transform as one field instead. Beyond the grid, where a field is
            zero, the affine is then missing.

        Returns
        -------
        float32[*S, D]
            On `grid`, millimetres, LPS; zero where there is no deformation.
        """
        if not with_affine:
            return self._to_physical(self.displacement)
        matrix = np.asarray(self.matrix, dtype=np.float64)
        # (A - 1)p is computed in float64: the positions are large beside what is left of them.
        shift = (matrix - np.eye(self.grid.ndim + 1)) @ self.grid.voxel_to_physical()
        index = np.moveaxis(np.indices(self.grid.shape)[::-1], 0, -1)
        affine_part = (index @ shift[:-1, :-1].T + shift[:-1, -1]).astype(np.float32)
        if self.displacement is None:
            return affine_part

        scales = _scales(self.grid)

        def whole(displacement: jax.Array, affine_part: jax.Array) -> jax.Array:
            return affine_part + rotate(matrix, _in_millimetres(displacement, *scales))

        operands = self.displacement, affine_part
        vectors: _Field = across(self.devices, whole, operands, (_PLANES, 0), 0)
        return vectors

    def inverse_displacement_field(self) -> _Field:
        """Return the inverse of the deformation as ITK reads it; the affine is not part of it.

        Returns
        -------
        float32[*S, D]
            On `grid`, millimetres, LPS; zero where there is no deformation.

        Raises
        ------
        ValueError
            If the inverse is not known.
        """
        if self.displacement is not None and self.inverse_displacement is None:
            raise ValueError("inverse_displacement: expected a field to invert with, got None")
        return self._to_physical(self.inverse_displacement)

    def _to_physical(self, displacement: ArrayLike | None) -> _Field:
        if displacement is None:
            return np.zeros((*self.grid.shape, self.grid.ndim), np.float32)
        scales = _scales(self.grid)

        def converted(displacement: jax.Array) -> jax.Array:
            return _in_millimetres(displacement, *scales)

        vectors: _Field = across(self.devices, converted, (displacement,), (_PLANES,), 0)
        return vectors

    def _computed(self, function: Callable[..., jax.Array], *fields: ArrayLike) -> Any:
        """Return what a function makes of fields of the grid: one of as many planes."""
        return across(self.devices, function, fields, [_PLANES] * len(fields), _PLANES)

    def inverse_residual(self) -> NDArray[np.float32]:
        """Return how far points are from where they started after the inverse and the deformation.

        Returns
        -------
        float32[*S]
            At the voxels of `grid`, in voxels: the length of ``e(y) + d(y + e(y))``. 0 where there
            is no deformation.

        Raises
        ------
        ValueError
            If the inverse of the deformation is not known.
        """
        if self.displacement is None:
            return np.zeros(self.grid.shape, np.float32)
        if self.inverse_displacement is None:
            raise ValueError("inverse_displacement: expected a field to invert with, got None")
        found = self._computed(_there_and_back, self.displacement, self.inverse_displacement)
        lengths: NDArray[np.float32] = np.asarray(found)[0]
        return lengths

    def inverse(self, grid: Grid) -> Transform:
        """Return the transform from the moving to the fixed space.

        Parameters
        ----------
        grid
            Its own grid, usually the moving one. The deformations are resampled on it.

        Returns
        -------
        Transform
            With the inverse affine as its matrix.

        Raises
        ------
        ValueError
            If the inverse of the deformation is not known.
        """
        there = Transform.from_parts(grid, self.inverse_parts, devices=self.devices)
        if self.displacement is None:
            return there
        chain = (self.inverse_parts[0], *self.parts)
        back = Transform.from_parts(grid, chain, devices=self.devices)
        return dataclasses.replace(there, inverse_displacement=back.displacement)

    def apply(
        self,
        moving: Volume,
        reference: Volume | Grid | None = None,
        *,
        interpolation: Interpolation = "linear",
        outside: Outside = None,
    ) -> Volume:
        """Bring a volume of the moving space to the fixed space.

        Parameters
        ----------
        moving
            What to sample.
        reference
            Gives the grid of the result; the transform's own by default.
        interpolation, outside
            See `resample`. By default what is outside of an image is its own background where that
            is clear, else 0; of labels 0.

        Returns
        -------
        Volume
            On the reference's grid.
        """
        grid = self.grid if reference is None else reference
        return resample(moving, grid, self.parts, interpolation, outside, devices=self.devices)

    def apply_inverse(
        self,
        fixed: Volume,
        reference: Volume | Grid,
        *,
        interpolation: Interpolation = "linear",
        outside: Outside = None,
    ) -> Volume:
        """Bring a volume of the fixed space to the moving space.

        Parameters
        ----------
        fixed
            What to sample.
        reference
            Gives the grid of the result, usually the moving volume.
        interpolation, outside
            See `resample`. By default what is outside of an image is its own background where that
            is clear, else 0; of labels 0.

        Returns
        -------
        Volume
            On the reference's grid.

        Raises
        ------
        ValueError
            If the inverse of the deformation is not known.
        """
        parts = self.inverse_parts
        return resample(fixed, reference, parts, interpolation, outside, devices=self.devices)


_Numbers = NDArray[np.float32]


def _linear(matrix: NDArray[np.float64]) -> _Numbers:
    return matrix[:-1, :-1].astype(np.float32)


def _scales(grid: Grid) -> tuple[_Numbers, _Numbers]:
    """Return the voxels per unit of normalised coordinates, and the linear part to millimetres."""
    # For an axis of one voxel the former is 0: displacements along it have no effect.
    voxels = (np.array(grid.shape[::-1]) - 1) / 2
    return voxels.astype(np.float32), _linear(grid.voxel_to_physical())


@Program
def _in_millimetres(displacement: jax.Array, voxels: _Numbers, linear: _Numbers) -> jax.Array:
    """Turn ``(1, *S, D)`` in normalised coordinates into ``(*S, D)``; see `_scales`."""
    return turned(linear, displacement.astype(jnp.float32)[0] * voxels)


@functools.partial(Program, static=("is_on_grid", "shape"))
def _chained(
    fields: Sequence[jax.Array],
    steps: Sequence[Step],
    to_normalised: _Numbers,
    *,
    is_on_grid: bool,
    shape: tuple[int, ...],
) -> jax.Array:
    """Return a chain as one displacement, ``(1, *S, D)``, normalised; see `displacements`."""
    vectors = displacements(fields, steps, is_on_grid=is_on_grid, shape=shape)
    return turned(to_normalised, vectors)[None]


@Program
def _inverted(displacement: jax.Array) -> jax.Array:
    return invert_displacement(displacement.astype(jnp.float32))


@Program
def _there_and_back(forward: jax.Array, back: jax.Array) -> jax.Array:
    """Return how many voxels points are from where they started, ``(1, *S)``."""
    both = compose(forward.astype(jnp.float32), back.astype(jnp.float32))
    voxels = convert_displacement(both, "normalised", "voxel")
    length: jax.Array = jnp.linalg.norm(voxels, axis=-1)
    return length
