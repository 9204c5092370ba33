"""The penalties that hold a deformable stage back."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from inputs import small_displacement
from scenes import header, physical_grid, scene

import jaxreg
from jaxreg.registration import (
    FFD,
    SVF,
    Bending,
    Curvature,
    Diffusion,
    Divergence,
    Elasticity,
    Greedy,
    Jacobian,
    Registration,
    Regulariser,
    SyN,
    register,
)
from regkernels import Volume

LOSSES = {
    Diffusion: "diffusion_loss",
    Bending: "bending_energy_loss",
    Curvature: "curvature_loss",
    Elasticity: "elasticity_loss",
    Divergence: "divergence_loss",
    Jacobian: "jacobian_loss",
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_penalty_is_the_loss_of_all_fields_times_a_weight(kind: type) -> None:
    fields = small_displacement(0, 2, (5, 6, 7), 0.1, np.float32)
    expected = getattr(reference, LOSSES[kind])(fields, reduction="sum")
    penalty = jax.jit(kind(0.3))(fields)
    assert penalty == pytest.approx(0.3 * float(expected), rel=1e-5)
    assert kind(0.3).energy(fields) == pytest.approx(float(expected), rel=1e-5)


def test_an_elastic_body_has_two_parameters() -> None:
    fields = small_displacement(0, 1, (6, 7), 0.1, np.float32)
    expected = reference.elasticity_loss(fields, mu=0.2, lam=3.0)
    assert Elasticity(2, mu=0.2, lam=3.0)(fields) == pytest.approx(2 * float(expected), rel=1e-5)


def grainy_pair() -> tuple[Volume, Volume]:
    """The same scene, shifted, with noise that has nothing to do with it."""
    volume = header((40, 44), (2.5, 2.5))
    points = physical_grid(volume)
    rng = np.random.default_rng(0)
    noise = (0.15 * rng.normal(size=volume.shape) for _ in range(2))
    fixed, moving = (
        volume.with_array((scene(points + k) + n).astype(np.float32))
        for k, n in zip((0, 6), noise, strict=True)
    )
    return fixed, moving


def spread(result: Registration) -> float:
    """Of the logarithms of the determinants: their standard deviation."""
    determinant = jaxreg.jacobian_determinant(result.transform.displacement)
    return float(jnp.log(jnp.maximum(determinant, 1e-3)).std())


@functools.cache
def registered(stage: type, penalty: Regulariser | None) -> Registration:
    schedule = {"scales": (2, 1), "iterations": (30, 20), "tolerance": 0}
    return register(*grainy_pair(), [stage(**schedule, regularisation=penalty)])


@pytest.mark.parametrize(
    ("stage", "penalty"),
    [
        (Greedy, Diffusion(0.5)),
        (SVF, Diffusion(0.5)),
        (SyN, Diffusion(0.5)),
        (SyN, Bending(0.5)),
        (SyN, Curvature(0.5)),
        (SyN, Elasticity(0.5)),
        (SyN, Divergence(1)),
        (SyN, Jacobian(0.5)),
        (FFD, Bending(5)),
        (FFD, Elasticity(0.5)),
    ],
)
def test_a_penalty_lowers_the_spread_of_determinants(stage: type, penalty: Regulariser) -> None:
    free, held = registered(stage, None), registered(stage, penalty)
    assert spread(held) < 0.7 * spread(free)
    assert held.folds.minimum > free.folds.minimum
    losses = held.stages[0].levels[-1].losses
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", LOSSES)
def test_equal_penalties_make_equal_stages(kind: type) -> None:
    """And share their programs: a penalty is no leaf of a pytree."""
    one, other = (SyN(regularisation=kind(0.3)) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != SyN(regularisation=kind(0.4))
    assert not jax.tree.leaves(kind(0.3))


def test_a_record_tells_the_penalty_and_its_weight() -> None:
    record = Greedy(regularisation=Elasticity(0.3, lam=2.0)).record()
    assert record["regularisation"] == "Elasticity(weight=0.3, mu=1.0, lam=2.0)"
    json.dumps(record)


def test_a_penalty_of_ones_own_has_an_energy() -> None:
    @dataclasses.dataclass(frozen=True)
    class Size(Regulariser):
        def energy(self, field: jax.Array) -> jax.Array:
            return (field**2).mean()

    assert Size(3.0)(jnp.full((1, 4, 5, 2), 2.0)) == 12
    assert Greedy(regularisation=Size(3.0)).record()["regularisation"].endswith("Size(weight=3.0)")


@pytest.mark.parametrize("value", [-0.1, 1e10, float("nan"), "much", None, True])
def test_weights_and_moduli_that_are_none_are_refused(value: object) -> None:
    for kind in LOSSES:
        with pytest.raises(ValueError, match="weight: expected a number from 0 to 1e"):
            kind(value)
    for name in ("mu", "lam"):
        with pytest.raises(ValueError, match=f"{name}: expected a number from 0 to 1e"):
            Elasticity(1.0, **{name: value})
