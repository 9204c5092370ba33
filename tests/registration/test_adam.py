"""Adam, which is written out: it is that of optax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreg.registration.stages.adam import adam_direction, no_moments


def test_steps_are_those_of_optax() -> None:
    rng = np.random.default_rng(0)
    parameters = {"shift": jnp.zeros(3), "matrix": jnp.zeros((3, 3))}
    moments, theirs = no_moments(parameters), optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-6)
    state = theirs.init(parameters)
    for _ in range(5):
        gradient = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), parameters)
        found, moments = adam_direction(gradient, moments, beta1=0.9, beta2=0.99, epsilon=1e-6)
        expected, state = theirs.update(gradient, state)
        for one, other in zip(
            jax.tree.leaves((found, moments)), jax.tree.leaves((expected, state)), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=1e-5)
