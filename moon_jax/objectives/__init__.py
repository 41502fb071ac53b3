"""The paper's objectives, as pure functions of an EncoderOutput and the alignment parameters."""

from moon_jax.objectives.alignment import objectives

__all__ = ["objectives"]
