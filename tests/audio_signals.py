"""Signals for the tests of audio, and how far two of them are apart."""

from __future__ import annotations

import math

import numpy as np


def tone(rate: int, seconds: float, hertz: float = 440.0, amplitude: float = 0.5) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def noise(channels: int, samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal((channels, samples))).astype(np.float32)


def decibels(error: np.ndarray, signal: np.ndarray) -> float:
    return 10 * math.log10(np.mean(np.square(error, dtype=np.float64)) / np.mean(np.square(signal, dtype=np.float64)))
