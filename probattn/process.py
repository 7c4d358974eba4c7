"""The process over infinite token sequences: lazily extended paths, prefixes, conditionals."""

from __future__ import annotations

import torch
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.distributions import LatentAttention, noise_distribution
from probattn.errors import InputError
from probattn.next_token import NextToken
from probattn.numerics.random import isolated_seed
from probattn.solve.context import Context
from probattn.solve.parallel import extend_unique
from probattn.solve.selection import Selection
from probattn.solve.token import solve_token

__all__ = ["AttentionProcess", "Path"]

_BLOCK = 256


class AttentionProcess:
    """u_i = mu_i(u_<i, u_i) + eps_i for i = 1, 2, ... without end.

    The distributions of its prefixes are consistent (that of u_1..n is the marginal of that of u_1..n+1) exactly where
    every conditional has mass one: where nothing folds.

    Args:
        attention: without batch axes.
        noise_scale: as in :class:`LatentAttention`, without batch axes.
        scale_tril: as in :class:`LatentAttention`.
        selection: rule where several solutions exist, see :mod:`probattn.solve.selection`.

    Raises:
        InputError: batch axes, or a noise that cannot be used.

    Example:
        >>> process = AttentionProcess(CausalAttention.from_qk_matrix(torch.tensor([[0.05]]).double()), 1.0)
        >>> path = process.path(seed=0)
        >>> bool(torch.equal(path[0:5], path[0:300][:5])), path.computed
        (True, 300)
    """

    def __init__(
        self,
        attention: CausalAttention,
        noise_scale: float | Tensor | None = None,
        *,
        scale_tril: Tensor | None = None,
        selection: Selection = "unique",
    ) -> None:
        if attention.batch_shape:
            raise InputError(f"a process has one attention; this one has batch shape {tuple(attention.batch_shape)}.")
        noise = noise_distribution(noise_scale, 1, attention.dim, like=attention.query, scale_tril=scale_tril)
        if noise.batch_shape:
            raise InputError(f"a process has one noise scale; this one has batch shape {tuple(noise.batch_shape)}.")
        self.attention = attention.detach()
        self.noise_scale, self.scale_tril, self.selection = noise_scale, scale_tril, selection

    def path(self, seed: int) -> Path:
        """One realisation, computed as far as it is looked at."""
        return Path(self, seed)

    def prefix(self, length: int) -> LatentAttention:
        """The distribution of the first ``length`` tokens."""
        return LatentAttention(
            self.attention, self.noise_scale, length, scale_tril=self.scale_tril, selection=self.selection
        )

    def conditional(self, past: Tensor) -> NextToken:
        """The distribution of the next token after ``past``, ``(*batch, n, p)``."""
        return NextToken(
            Context.of(self.attention, past), self.noise_scale, scale_tril=self.scale_tril, selection=self.selection
        )

    def noise(self, seed: int, block: int) -> Tensor:
        """Noise of the tokens 256 * block .. 256 * block + 255, (256, p): a function of seed and block alone."""
        return self._draw(seed, block)[0]

    def _draw(self, seed: int, block: int) -> tuple[Tensor, Tensor]:
        """The noise of a block, (256, p), and the uniform numbers by which a random rule chooses, (256,)."""
        noise = noise_distribution(
            self.noise_scale, _BLOCK, self.attention.dim, like=self.attention.query, scale_tril=self.scale_tril
        )
        with isolated_seed((seed * 0x9E3779B97F4A7C15 + block) % (1 << 63)):
            draw: Tensor = noise.sample()
            return draw, torch.rand(_BLOCK, dtype=torch.float64).to(draw)


class Path:
    """One realisation of an :class:`AttentionProcess`, lazily extended; index it like a list of tokens that never ends.

    ``path[0:100]`` and later ``path[0:10000]`` agree to the bit, as each token is solved for once, from noise that
    depends on seed and position alone, the choice among several solutions included. Where a memory radius makes the
    attention a contraction for every past, 256 tokens are solved for at once. Memory and the time of the next token
    grow with the furthest token asked for.
    """

    def __init__(self, process: AttentionProcess, seed: int) -> None:
        self.process, self.seed = process, seed
        self._tokens: list[Tensor] = []
        self._noise, self._uniform = (part[:0] for part in process._draw(seed, 0))
        self._context = Context.of(process.attention, self._noise)

    @property
    def computed(self) -> int:
        """Number of tokens computed so far."""
        return len(self._tokens)

    def __len__(self) -> int:
        """There is none.

        Raises:
            TypeError: always; as for any object without a length.
        """
        raise TypeError("a path has no end and so no length; .computed says how many of its tokens have been computed.")

    def __bool__(self) -> bool:
        """True: there is always another token."""
        return True

    def __getitem__(self, index: int | slice) -> Tensor:
        """Token ``index``, (p,), or a slice of tokens, (n, p), extending the path where needed.

        Raises:
            InputError: a slice without an end, or a negative position: the path has no end to count from.
            SeveralSolutionsError, NoSolutionError: while extending.
        """
        if isinstance(index, slice):
            if index.stop is None or index.stop < 0 or (index.start or 0) < 0 or (index.step or 1) < 1:
                raise InputError(
                    f"{index}: a path has no end; give a slice with start >= 0, a stop, and a positive step."
                )
            self._extend(index.stop)
            chosen = self._tokens[index]
            return torch.stack(chosen) if chosen else self._noise[:0]
        if index < 0:
            raise InputError(f"position {index}: a path has no end to count from; give a position of at least 0.")
        self._extend(index + 1)
        return self._tokens[index]

    @torch.no_grad()
    def _extend(self, length: int) -> None:
        while len(self._tokens) < length:
            position = len(self._tokens)
            block, offset = divmod(position, _BLOCK)
            if offset == 0:
                self._noise, self._uniform = self.process._draw(self.seed, block)
                if bool(self._context.ceiling < 1):  # always a whole block, however far it is asked for
                    self._context, tokens = extend_unique(self._context, self._noise)
                    self._tokens.extend(tokens)
                    continue
            noise, uniform = self._noise[offset], self._uniform[offset]
            token, _ = solve_token(self._context, noise, self.process.selection, position, uniform)
            self._context = self._context.extend(token)
            self._tokens.append(token)
