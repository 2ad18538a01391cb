"""Residual streams as named orthogonal directions in a randomly rotated basis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mechmm.zoo.planted.program import ONE, Terms

STEADY = 160.0
"""Length of the component that every position has along `one`. It is long beside everything else,
so that norms divide by almost the same number whatever the rest of the stream is."""
REST = 40.0
"""What the rest of a stream adds to its squared length, about."""
CONTENT = 3.0
"""Length of what is not along `one` and varies, about."""


class Space:
    """The directions of one residual stream.

    Attributes:
        width: of the stream.
        task: orthonormal directions of the symbols [symbol, width].
        noise: orthonormal directions of all that is left [noise, width]; what is written there is
            read by noise alone.
    """

    def __init__(
        self, symbols: Sequence[str], width: int, random: np.random.Generator, *, centred: bool
    ) -> None:
        """Draw the rotation.

        Args:
            symbols: `one` among them.
            width: of the stream.
            random: what draws.
            centred: whether all directions have mean 0, as layer norms need it.

        Raises:
            ValueError: where the stream is too narrow to leave as many noise directions as
                an eighth of it.
        """
        self.width = width
        self.index = {symbol: i for i, symbol in enumerate(symbols)}
        first = np.ones((width, 1)) if centred else np.empty((width, 0))
        drawn = random.standard_normal((width, width - first.shape[1]))
        basis, _ = np.linalg.qr(np.concatenate([first, drawn], axis=1))
        rows = basis.T[first.shape[1] :]
        self.task, self.noise = rows[: len(symbols)], rows[len(symbols) :]
        if len(self.noise) < width // 8:
            raise ValueError(f"{len(symbols)} symbols do not fit into a stream of width {width}")

    def write(self, terms: Terms) -> np.ndarray:
        """The vector [width] that holds some symbols."""
        return self._sum(terms, STEADY)

    def read(self, terms: Terms) -> np.ndarray:
        """The vector [width] whose product with a stream is the value of the terms."""
        return self._sum(terms, 1 / STEADY)

    def _sum(self, terms: Terms, steady: float) -> np.ndarray:
        """Directions times coefficients, that of `one` times `steady`."""
        total = np.zeros(self.width)
        for symbol, coefficient in terms.items():
            total += (
                coefficient * (steady if symbol == ONE else 1.0) * self.task[self.index[symbol]]
            )
        return total

    @property
    def gain(self) -> float:
        """What a norm without weights divides a typical stream by."""
        return float(np.sqrt((STEADY**2 + REST) / self.width))

    def scramble(self, rows: int, random: np.random.Generator) -> np.ndarray:
        """Random readers [rows, width] of everything but `one`: symbols and noise alike."""
        others = np.delete(self.task, self.index[ONE], axis=0)
        directions = np.concatenate([others, self.noise])
        drawn = random.standard_normal((rows, len(directions)))
        return drawn @ directions / CONTENT

    def babble(self, columns: int, random: np.random.Generator) -> np.ndarray:
        """Random writers [width, columns] into the noise directions."""
        drawn = random.standard_normal((len(self.noise), columns))
        return self.noise.T @ drawn / np.sqrt(len(self.noise))
