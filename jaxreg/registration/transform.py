"""The transform that a registration finds, and what can be done with it.

A transform maps points: to resample an image onto a grid, every voxel of the grid is sent through
the transform and the image is read where it arrives. So the transform that brings the moving image
to the fixed one maps the fixed space to the moving space.

Transforms are chained of *parts*, each a homogeneous matrix or a `DisplacementField`, listed in
the order in which a point goes through them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxreg import (
    compose,
    convert_displacement,
    interpolate,
    interpolate_labels,
    invert_displacement,
)
from jaxreg.registration.grid import Grid, Matrix, inverse_matrix
from jaxreg.registration.volume import Volume

__all__ = ["DisplacementField", "Interpolation", "Part", "Transform", "move_points", "resample"]

Interpolation = Literal["linear", "nearest", "labels"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DisplacementField:
    """Maps a point ``p`` to ``p + v(p)``; a JAX pytree.

    As ITK reads such a field: linear between voxel centres, constant in the outer half of the
    outermost voxels, and zero beyond.

    Attributes
    ----------
    grid
        Where the vectors are.
    vectors
        ``([Z,] Y, X, D)``, millimetres, LPS.
    """

    grid: Grid
    vectors: Any

    def inverse(self, *, tolerance: float = 0.01) -> tuple[DisplacementField, NDArray[np.float32]]:
        """Return the field that undoes this one, by `jaxreg.invert_displacement`.

        Parameters
        ----------
        tolerance
            In voxels: how far from where it started a point may be after both fields.

        Returns
        -------
        field : DisplacementField
            On the same grid. For it, this field goes on beyond its grid as it is at the border.
        residual : float32[*S]
            In voxels: how far off it is. Where this field folds it may be above the tolerance.
        """
        voxels = inverse_matrix(self.grid.voxel_to_physical())
        size = jnp.asarray(2 / np.array(self.grid.shape[::-1]), jnp.float32)
        displacement = _rotate(voxels, jnp.asarray(self.vectors, jnp.float32)) * size
        found, residual = invert_displacement(
            displacement[None], tolerance=tolerance, align_corners=False, return_residual=True
        )
        vectors = _rotate(self.grid.voxel_to_physical(), found[0] / size)
        return DisplacementField(self.grid, vectors), np.asarray(residual)[0]


Part = NDArray[np.float64] | DisplacementField


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
    """

    grid: Grid
    matrix: Any
    displacement: Any = None
    inverse_displacement: Any = None

    @classmethod
    def from_parts(cls, grid: Grid, parts: Sequence[Part]) -> Transform:
        """Return a chain of parts as one transform, without the inverse of its deformation.

        Parameters
        ----------
        grid
            The fixed grid.
        parts
            In the order in which a point goes through them; any number.

        Returns
        -------
        Transform
            With the product of the matrices. What the displacement fields do is resampled on the
            grid; a field on this grid that comes first keeps its values.
        """
        matrix, vectors = _compose(parts, grid)
        if vectors is None:
            return cls(grid, matrix)
        return cls(grid, matrix, _to_normalised(vectors, grid))

    def with_inverse(self) -> Transform:
        """Return the same transform with the inverse of its deformation.

        It is computed by `jaxreg.invert_displacement`, to 0.01 voxels; `inverse_error` tells where
        that was not reached.
        """
        if self.displacement is None:
            return self
        inverse = invert_displacement(jnp.asarray(self.displacement, jnp.float32))
        return dataclasses.replace(self, inverse_displacement=inverse)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The deformation, if there is one, and the affine, as a point goes through them."""
        matrix = np.asarray(self.matrix, dtype=np.float64)
        if self.displacement is None:
            return (matrix,)
        return (DisplacementField(self.grid, self.displacement_field()), matrix)

    @property
    def inverse_parts(self) -> tuple[Part, ...]:
        """The inverse affine and, if there is one, the inverse deformation.

        Raises
        ------
        ValueError
            If the inverse of the deformation is not known.
        """
        matrix = inverse_matrix(np.asarray(self.matrix, dtype=np.float64))
        if self.displacement is None:
            return (matrix,)
        return (matrix, DisplacementField(self.grid, self.inverse_displacement_field()))

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

    def displacement_field(self, *, with_affine: bool = False) -> jax.Array:
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
        vectors = _to_physical(self.displacement, self.grid)
        if not with_affine:
            return vectors
        matrix = np.asarray(self.matrix, dtype=np.float64)
        # (A - 1)p in float64 first: the positions are large beside what is left of them.
        shift = (matrix - np.eye(self.grid.ndim + 1)) @ self.grid.voxel_to_physical()
        index = np.moveaxis(np.indices(self.grid.shape)[::-1], 0, -1)
        affine_part = index @ shift[:-1, :-1].T + shift[:-1, -1]
        return jnp.asarray(affine_part, jnp.float32) + _rotate(matrix, vectors)

    def inverse_displacement_field(self) -> jax.Array:
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
        return _to_physical(self.inverse_displacement, self.grid)

    def inverse_error(self) -> NDArray[np.float32]:
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
        forward, back = (
            jnp.asarray(field, jnp.float32)
            for field in (self.displacement, self.inverse_displacement)
        )
        voxels = convert_displacement(compose(forward, back), "normalised", "voxel")
        lengths: NDArray[np.float32] = np.linalg.norm(np.asarray(voxels)[0], axis=-1)
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
        there = Transform.from_parts(grid, self.inverse_parts)
        if self.displacement is None:
            return there
        back = Transform.from_parts(grid, (self.inverse_parts[0], *self.parts))
        return dataclasses.replace(there, inverse_displacement=back.displacement)

    def apply(
        self,
        moving: Volume,
        reference: Volume | Grid | None = None,
        *,
        interpolation: Interpolation = "linear",
    ) -> Volume:
        """Bring a volume of the moving space to the fixed space.

        Parameters
        ----------
        moving
            What to sample; zero outside of its grid.
        reference
            Gives the grid of the result; the transform's own by default.
        interpolation
            See `resample`.

        Returns
        -------
        Volume
            On the reference's grid.
        """
        return resample(
            moving, self.grid if reference is None else reference, self.parts, interpolation
        )

    def apply_inverse(
        self,
        fixed: Volume,
        reference: Volume | Grid,
        *,
        interpolation: Interpolation = "linear",
    ) -> Volume:
        """Bring a volume of the fixed space to the moving space.

        Parameters
        ----------
        fixed
            What to sample; zero outside of its grid.
        reference
            Gives the grid of the result, usually the moving volume.
        interpolation
            See `resample`.

        Returns
        -------
        Volume
            On the reference's grid.

        Raises
        ------
        ValueError
            If the inverse of the deformation is not known.
        """
        return resample(fixed, reference, self.inverse_parts, interpolation)


def resample(
    volume: Volume,
    reference: Volume | Grid,
    parts: Sequence[Part] = (),
    interpolation: Interpolation = "linear",
) -> Volume:
    """Sample a volume where a chain of transforms sends the voxels of a grid.

    Parameters
    ----------
    volume
        What to sample; zero outside of its grid, with a linear decline over one voxel.
    reference
        Gives the grid of the result.
    parts
        Matrices ``(D + 1, D + 1)`` and displacement fields, in the order in which a point of the
        reference goes through them.
    interpolation
        ``"linear"``, with a result in float32; ``"nearest"``; or ``"labels"``, the label with the
        largest sum of linear weights. The latter two keep the dtype, and make up no values.

    Returns
    -------
    Volume
        On the reference's grid.

    Raises
    ------
    ValueError
        If the dimensions differ, a matrix cannot be inverted where it has to be, or labels are
        not integers.
    """
    grid = reference.grid if isinstance(reference, Volume) else reference
    if grid.ndim != volume.ndim:
        raise ValueError(f"reference: expected {volume.ndim} dimensions as volume, got {grid.ndim}")
    # Between outer edges an axis of one voxel has a length, and leaving it is noticed.
    to_physical = grid.normalised_to_physical(align_corners=False)
    matrix, vectors = _compose(parts, grid)
    affine = _affine(volume.grid, matrix @ to_physical)
    displacement = None if vectors is None else _rotate(inverse_matrix(to_physical), vectors)[None]

    where: dict[str, Any] = {
        "affine": jnp.asarray(affine, jnp.float32),
        "grid": displacement,
        "affine_last": True,
        "out_shape": grid.shape,
        "align_corners": False,
    }
    values = np.asarray(volume.array)
    batch = values.reshape(1, volume.channels, *volume.shape)
    if interpolation == "linear":
        sampled = np.asarray(interpolate(jnp.asarray(batch, jnp.float32), **where))
    elif interpolation == "nearest":
        codes, decode = _encode(batch)
        sampled = decode(np.asarray(interpolate(jnp.asarray(codes), mode="nearest", **where)))
    else:
        sampled = _sample_labels(batch, where)
    return Volume.on_grid(grid, sampled.reshape(*values.shape[: -volume.ndim], *grid.shape))


def _sample_labels(labels: NDArray[Any], where: dict[str, Any]) -> NDArray[Any]:
    whole = labels
    if not np.issubdtype(labels.dtype, np.integer):
        whole = labels.astype(np.int64)
        if not np.array_equal(whole, labels):
            raise ValueError("volume: expected labels, which are integers, got other numbers")
    with jax.enable_x64(whole.dtype.itemsize == 8):
        sampled = interpolate_labels(jnp.asarray(whole), **where)
    return np.asarray(sampled).astype(labels.dtype)


def _encode(
    values: NDArray[Any],
) -> tuple[NDArray[np.float32], Callable[[NDArray[np.float32]], NDArray[Any]]]:
    """Write values in float32 without loss, 0 as 0, and give the way back.

    Where float32 does not hold all values of their dtype, they are numbered.
    """
    if np.can_cast(values.dtype, np.float32):
        return values.astype(np.float32), lambda codes: codes.astype(values.dtype)
    different = np.union1d(values, [0]).astype(values.dtype)
    zero = np.searchsorted(different, 0)
    codes = np.searchsorted(different, values) - zero
    if different.size > 2**24:
        raise ValueError(f"volume: expected at most 2^24 different values, got {different.size}")
    return codes.astype(np.float32), lambda codes: different[codes.astype(np.int64) + zero]


def move_points(points: ArrayLike, parts: Sequence[Part]) -> NDArray[np.float64]:
    """Send points through a chain of transforms.

    Parameters
    ----------
    points
        ``(..., D)``, millimetres, LPS.
    parts
        Matrices ``(D + 1, D + 1)`` and displacement fields, in the order in which a point goes
        through them.

    Returns
    -------
    ndarray
        ``(..., D)``, millimetres, LPS.

    Raises
    ------
    ValueError
        If these are not finite points of D coordinates.
    """
    moved = np.array(points, dtype=np.float64)
    for part in parts:
        ndim = part.grid.ndim if isinstance(part, DisplacementField) else len(part) - 1
        if moved.ndim == 0 or moved.shape[-1] != ndim:
            raise ValueError(f"points: expected shape (..., {ndim}), got {moved.shape}")
        if not np.isfinite(moved).all():
            raise ValueError("points: expected finite coordinates, got NaN or infinity")
        if isinstance(part, DisplacementField):
            inverse = inverse_matrix(part.grid.normalised_to_physical(align_corners=False))
            where = (moved @ inverse[:-1, :-1].T + inverse[:-1, -1]).reshape(-1, ndim)
            batch = jnp.asarray(where, jnp.float32).reshape(*(1,) * ndim, -1, ndim)
            found = _sample_vectors(part, None, batch, is_displacement=False)
            moved = moved + np.asarray(found, dtype=np.float64).reshape(moved.shape)
        else:
            moved = moved @ part[:-1, :-1].T + part[:-1, -1]
    return moved


def _compose(parts: Sequence[Part], grid: Grid) -> tuple[Matrix, jax.Array | None]:
    """Write a chain on a grid as ``p -> A(p + v(p))``: ``A``, and ``v`` in millimetres or None."""
    matrix, vectors = np.eye(grid.ndim + 1), None
    to_physical = grid.normalised_to_physical(align_corners=False)
    for part in parts:
        if not isinstance(part, DisplacementField):
            matrix = part @ matrix
            continue
        before = None if vectors is None else _rotate(inverse_matrix(to_physical), vectors)[None]
        affine = _affine(part.grid, matrix @ to_physical)
        same = part.grid.shape == grid.shape and np.allclose(
            affine, np.eye(*affine.shape[1:]), 0, 1e-7
        )
        if same and before is None:
            found = jnp.asarray(part.vectors, jnp.float32)  # without the memory that sampling takes
        else:
            found = _sample_vectors(part, affine, before, affine_last=True, out_shape=grid.shape)
        step = _rotate(inverse_matrix(matrix), found)
        vectors = step if vectors is None else vectors + step
    return matrix, vectors


def _affine(sampled: Grid, to_physical: Matrix) -> Matrix:
    """Return the ``affine`` of `interpolate` from a matrix to physical space, ``(1, D, D + 1)``."""
    to_normalised = inverse_matrix(sampled.normalised_to_physical(align_corners=False))
    return (to_normalised @ to_physical)[None, :-1]


def _sample_vectors(
    field: DisplacementField, affine: Matrix | None, grid: jax.Array | None, **where: Any
) -> jax.Array:
    """Sample a displacement field as ITK does: `interpolate` with these arguments, ``(*T, D)``."""
    if affine is not None:
        where["affine"] = jnp.asarray(affine, jnp.float32)
    vectors = jnp.moveaxis(jnp.asarray(field.vectors, jnp.float32), -1, 0)[None]
    found = interpolate(vectors, grid=grid, padding_mode="border", align_corners=False, **where)
    # The nearest voxel exists up to half a voxel beyond the outermost centres.
    ones = jnp.ones((1, 1, *field.grid.shape), jnp.float32)
    inside = interpolate(ones, grid=grid, mode="nearest", align_corners=False, **where)
    return jnp.moveaxis((found * inside)[0], 0, -1)


def _rotate(matrix: Matrix, vectors: jax.Array) -> jax.Array:
    """Multiply vectors ``(..., D)`` by the linear part of a homogeneous matrix."""
    linear = jnp.asarray(matrix[:-1, :-1], jnp.float32)
    # By default a GPU rounds the factors of a product to fewer bits.
    return jnp.einsum("ij,...j->...i", linear, vectors, precision=jax.lax.Precision.HIGHEST)


def _to_physical(displacement: ArrayLike | None, grid: Grid) -> jax.Array:
    """Turn ``(1, *S, D)`` in normalised coordinates into ``(*S, D)`` in millimetres."""
    if displacement is None:
        return jnp.zeros((*grid.shape, grid.ndim), jnp.float32)
    # For an axis of one voxel this is 0: displacements along it have no effect.
    voxels = jnp.asarray((np.array(grid.shape[::-1]) - 1) / 2, jnp.float32)
    return _rotate(grid.voxel_to_physical(), jnp.asarray(displacement, jnp.float32)[0] * voxels)


def _to_normalised(vectors: jax.Array, grid: Grid) -> jax.Array:
    """Turn ``(*S, D)`` in millimetres into ``(1, *S, D)`` in normalised coordinates."""
    return _rotate(inverse_matrix(grid.normalised_to_physical()), vectors)[None]
