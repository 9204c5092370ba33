"""Makes JAX pytrees of grids, volumes and the parts of transforms, which know no framework."""

from __future__ import annotations

import jax

from regkernels import AffineMap, DisplacementField, Grid, Volume

__all__: list[str] = []

# A grid's shape is static: programs are compiled for shapes.
jax.tree_util.register_dataclass(
    Grid, data_fields=["spacing", "origin", "direction"], meta_fields=["shape"]
)
jax.tree_util.register_dataclass(Volume, data_fields=["array", "grid"], meta_fields=[])
jax.tree_util.register_dataclass(AffineMap, data_fields=["matrix"], meta_fields=[])
jax.tree_util.register_dataclass(DisplacementField, data_fields=["grid", "vectors"], meta_fields=[])
