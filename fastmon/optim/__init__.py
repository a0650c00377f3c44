"""Optimizers that tell what they did: Muon on hidden matrices."""

from fastmon.optim.muon import Muon

__all__ = ["Muon"]
