"""A small measurement, made without tracing a model."""

from __future__ import annotations

from functools import cache

from mixcomp import manager
from mixcomp.config import MeasureConfig
from mixcomp.fingerprint import Identity
from mixcomp.measurement import Measurement
from mixcomp.passes import AnnotateSalience, CollectStatistics
from mixcomp.passes.coupling import analyse
from mixcomp.program import Program
from programs import Blueprint, Kind, Layer, build, context

MODEL = Blueprint((Layer(Kind.RESIDUAL, 96, bias=True), Layer(Kind.PLAIN, 40)), width=64, vocab=13, seed=3)
UP, DOWN, PROJ = "layers.0.up", "layers.0.down", "layers.1.proj"


@cache
def priced() -> Program:
    """A program with statistics and prices; ``DOWN`` absorbs the order of ``UP``."""
    return manager.run(build(MODEL), (CollectStatistics(), AnnotateSalience()), context(MODEL))


@cache
def measurement() -> Measurement:
    program = priced()
    return Measurement.of(program, analyse(program), Identity.of(program), MeasureConfig(seed=3), "a few tokens")
