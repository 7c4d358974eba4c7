r"""Checks of the exercises in the last notebook: each tells whether an answer is right and, if not, gives a hint.

A check never shows the solution. None means "not answered yet", and an exception in a reader's own function becomes
part of the feedback, so that the notebook runs to its end in any state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.blocks import smallest_singular_value_one_minus
from probattn.next_token import NextToken
from probattn.numerics import linalg
from probattn.solve.context import Context

__all__ = [
    "Feedback",
    "check_block",
    "check_determinant",
    "check_fold",
    "check_mass",
    "check_previous_query",
    "check_roots",
    "check_stationary",
    "check_triangularity",
    "corners",
]

Block = Callable[[Tensor, Tensor, Tensor], Tensor]
Count = Callable[[float, float], int]
Residual = Callable[[Tensor, Tensor], Tensor]

_STRENGTH, _NOISE = 3.0, 0.5  # for the exercise on the mass
_CASES = ((0.8, 0.0), (0.8, 0.7), (-2.0, 0.1), (1.5, 0.0), (1.5, 0.2), (3.0, 0.0), (3.0, -0.3), (3.0, 0.6), (9.0, -0.6))
_SLOPE = 0.1  # for the exercise on the spread


@dataclass(frozen=True)
class Feedback:
    """Result of a check.

    Attributes:
        passed: True or False; None without an answer.
        message: result in words.

    Example:
        >>> check_fold(None)
        not answered yet
    """

    passed: bool | None
    message: str

    def __repr__(self) -> str:
        if self.passed is None:
            return self.message
        return f"{'right' if self.passed else 'not yet'}: {self.message}"


_UNANSWERED = Feedback(None, "not answered yet")


def check_block(answer: Block | None) -> Feedback:
    r"""Check the Jacobian block of one head with W_V = W_O = I under the strict mask, :math:`J_i = I - \Sigma_i A`.

    Args:
        answer: function of A ``(p, p)``, the past ``(n, p)`` and the token ``(p,)`` that returns J_i ``(p, p)``.

    Example:
        >>> check_block(lambda A, past, u: torch.eye(len(u)).to(u))
        not yet: this is the identity; does the block depend on the past at all?
    """
    if answer is None:
        return _UNANSWERED
    generator = torch.Generator().manual_seed(0)
    for dim, length in ((1, 2), (2, 3), (3, 7)):
        matrix, past, u = (
            0.7 * torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((dim, dim), (length, dim), (dim,))
        )
        found = _tensor(answer, (dim, dim), "J_i", matrix, past, u)
        if isinstance(found, Feedback):
            return found
        exact = Context.of(CausalAttention.from_qk_matrix(matrix), past).mean_and_jacobian(u)[1]
        if _close(found, exact, 1e-8):
            continue
        identity = torch.eye(dim, dtype=torch.float64)
        if _close(found, identity, 1e-8):
            return _wrong("this is the identity; does the block depend on the past at all?")
        if _close(found, 2 * identity - exact, 1e-8):
            return _wrong("right up to a sign: is the mean added to the token in e, or subtracted from it?")
        if _close(found, exact.mT, 1e-8):
            return _wrong("transposed: rows are the components of e_i, columns those of u_i.")
        if dim == 1:
            return _wrong("wrong for two tokens on a line; are the covariances weighted by the attention, and centred?")
        return _wrong(f"right on a line, wrong in {dim} dimensions: check the order of the factors.")
    return Feedback(True, "it agrees with automatic differentiation in 1, 2 and 3 dimensions.")


def check_triangularity(answer: Tensor | None, attention: CausalAttention, u: Tensor) -> Feedback:
    """Check the Jacobian of e(u) = u - mu(u) for a sequence: zero above its blocks, the J_i on the diagonal.

    Args:
        answer: Jacobian de/du, ``(T p, T p)``.
        attention: attention whose residual is differentiated.
        u: sequence, ``(T, p)``.

    Example:
        >>> attention = CausalAttention.from_qk_matrix(torch.tensor([[0.5]], dtype=torch.float64))
        >>> check_triangularity(torch.eye(3).double(), attention, torch.tensor([[-1.0], [1.0], [0.0]]).double())
        not yet: its diagonal blocks are not the J_i of this sequence; is it the derivative of e, not of mu?
    """
    if answer is None:
        return _UNANSWERED
    length, dim = u.shape
    found = _tensor(lambda: answer, (length * dim, length * dim), "de/du")
    if isinstance(found, Feedback):
        return found
    blocks = found.view(length, dim, length, dim)
    above = torch.triu(torch.ones(length, length), diagonal=1).bool()
    largest = float(blocks.abs().amax((1, 3))[above].max())
    if largest > 1e-12:
        return _wrong(f"there is {largest:.3g} above the diagonal blocks: a residual depends on a later token.")
    diagonal = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    if not _close(diagonal, attention.jacobian(u), 1e-8):
        return _wrong("its diagonal blocks are not the J_i of this sequence; is it the derivative of e, not of mu?")
    exact = torch.func.jacrev(lambda x: x - attention.mean(x))(u).reshape(found.shape)
    if not _close(found, exact, 1e-8):
        return _wrong("the diagonal blocks are right, but something below them is not.")
    return Feedback(True, "zero above, J_i on the diagonal: the determinant is the product of the small determinants.")


def check_fold(answer: float | None) -> Feedback:
    """Check the smallest slope a at which u - mu(u) folds after the past (-1, 2).

    Args:
        answer: slope a.

    Example:
        >>> check_fold(1.0)
        not yet: at this slope the map has already folded; the fold appears earlier.
    """
    if answer is None:
        return _UNANSWERED
    a = _number(answer, "a")
    if isinstance(a, Feedback):
        return a
    onset = 4 / 9  # the largest variance of two tokens at distance 3 is 9 / 4
    if abs(a - onset) < 2e-3 * onset:
        return Feedback(True, "there det J touches zero at one u and nowhere else.")
    if abs(a - 4 * onset) < 1e-2 or abs(a - 1 / 9) < 1e-2:
        return _wrong("almost: how large can the variance of a distribution on two points at this distance become?")
    side = "has already folded; the fold appears earlier." if a > onset else "does not fold yet, for any u."
    return _wrong(f"at this slope the map {side}")


def check_roots(answer: Count | None) -> Feedback:
    """Check the number of tokens that solve u - tanh(a u) = eps, the equation after the past (-1, 1).

    Args:
        answer: function of a and eps that returns the number of solutions.

    Example:
        >>> check_roots(lambda a, eps: 1)
        not yet: a = 1.5, eps = 0: 1 is not the number of solutions; look at the curve.
    """
    if answer is None:
        return _UNANSWERED
    past = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    for a, eps in _CASES:
        attention = CausalAttention.from_qk_matrix(torch.tensor([[a]], dtype=torch.float64))
        next_token = NextToken(Context.of(attention, past), 1.0)
        try:
            count = answer(a, eps)
        except Exception as error:  # the reader's code may raise anything
            return _raised(error)
        case = f"a = {a:g}, eps = {eps:g}"
        if not isinstance(count, Integral):
            return _wrong(f"{case}: returned {count!r}; return a whole number.")
        if count != len(next_token.roots(eps)):
            return _wrong(f"{case}: {count} is not the number of solutions; look at the curve.")
    return Feedback(True, f"the same as the library finds, in {len(_CASES)} cases on both sides of the boundary.")


def check_mass(answer: float | None) -> Feedback:
    r"""Check the mass after the past (-1, 1) at a = 3, sigma = 0.5, :math:`Z = \int N(e(u); 0, \sigma^2) |e'(u)|\, du`.

    Args:
        answer: Z, to 0.1 %.

    Example:
        >>> check_mass(1.0)
        not yet: that is the integral with the sign of e'; a density has no negative parts.
    """
    if answer is None:
        return _UNANSWERED
    found = _number(answer, "Z")
    if isinstance(found, Feedback):
        return found
    attention = CausalAttention.from_qk_matrix(torch.tensor([[_STRENGTH]], dtype=torch.float64))
    past = Context.of(attention, torch.tensor([[-1.0], [1.0]], dtype=torch.float64))
    exact = NextToken(past, _NOISE).mass().value
    if abs(found / exact - 1) < 1e-3:
        return Feedback(True, "and it is the mean number of solutions, over the noise.")
    if abs(found - 1) < 1e-3:
        return _wrong("that is the integral with the sign of e'; a density has no negative parts.")
    if found < 1:
        return _wrong("Z is never below 1; does the grid reach far enough, and is the Gaussian normalised?")
    if abs(found - 3) < 1e-3:
        return _wrong("not every noise has that many solutions: average the number over the noise.")
    return _wrong("not within 0.1 %; refine the grid near e' = 0, and check sigma.")


def check_determinant(answer: Tensor | None) -> Feedback:
    """Check a matrix A for which, after the four :func:`corners` at u = 0, det J = 1 and sigma_min(J) < 0.05.

    Args:
        answer: A, ``(2, 2)``.

    Example:
        >>> check_determinant(torch.zeros(2, 2))
        not yet: det J is 1 and sigma_min is 1: too comfortable.
    """
    if answer is None:
        return _UNANSWERED
    matrix = _tensor(lambda: answer, (2, 2), "A")
    if isinstance(matrix, Feedback):
        return matrix
    origin = torch.zeros(2, dtype=torch.float64)
    block = Context.of(CausalAttention.from_qk_matrix(matrix), corners()).mean_and_jacobian(origin)[1]
    determinant = float(linalg.det(block))
    smallest = float(smallest_singular_value_one_minus(torch.eye(2, dtype=torch.float64) - block))
    if abs(determinant - 1) > 1e-6:
        return _wrong(f"det J is {determinant:.6g}, not 1; what is the covariance of the corners at u = 0?")
    if smallest >= 0.05:
        return _wrong(f"det J is 1 and sigma_min is {smallest:.3g}: too comfortable.")
    words = f"b = 0, and yet noise in one direction grows by a factor of {1 / smallest:.0f} on its way to the token."
    return Feedback(True, words)


def check_stationary(answer: float | None) -> Feedback:
    """Check the stationary spread at a = 0.1, sigma = 1, on the branch that begins at V = sigma^2 for weak attention.

    Args:
        answer: variance V, to 0.1 %.

    Example:
        >>> check_stationary(1.0)
        not yet: V (1 - a V)^2 is 0.81 there and should be sigma^2 = 1.
    """
    if answer is None:
        return _UNANSWERED
    v = _number(answer, "V")
    if isinstance(v, Feedback):
        return v
    left = v * (1 - _SLOPE * v) ** 2
    if abs(left - 1) > 2e-3:
        return _wrong(f"V (1 - a V)^2 is {left:.3g} there and should be sigma^2 = 1.")
    if v > 1 / (3 * _SLOPE):
        return _wrong(
            "it solves the equation, but does this branch begin at V = sigma^2 for weak attention? Is it stable?"
        )
    return Feedback(True, "V solves the equation and lies below 1/(3a), where the branch is stable.")


def check_previous_query(answer: Residual | None) -> Feedback:
    r"""Check the residuals of a model whose query is the token before, :math:`e_i = u_i - \sum_s \alpha_{is} u_s`.

    Here :math:`\alpha_{is} \propto \exp(u_s^\top A\, u_{i-1})` over s < i, and :math:`e_1 = u_1`.

    Args:
        answer: differentiable function of A ``(p, p)`` and u ``(T, p)`` that returns e ``(T, p)``.

    Example:
        >>> check_previous_query(lambda A, u: u)
        not yet: e is not u minus the mean of the past under the query of the token before.
    """
    if answer is None:
        return _UNANSWERED
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for strength in (0.5, 5.0):
        matrix = strength * torch.randn(2, 2, generator=generator, dtype=torch.float64)
        u = torch.randn(6, 2, generator=generator, dtype=torch.float64)
        found = _tensor(answer, (6, 2), "e", matrix, u)
        if isinstance(found, Feedback):
            return found
        expected, own = u.clone(), u - CausalAttention.from_qk_matrix(matrix).mean(u)
        for i in range(1, len(u)):
            expected[i] -= torch.softmax(u[:i] @ matrix @ u[i - 1], 0) @ u[:i]
        if _close(found, own, 1e-8):
            return _wrong("that is the model of this project, where each token is its own query.")
        if not _close(found, expected, 1e-8):
            return _wrong("e is not u minus the mean of the past under the query of the token before.")
        try:
            whole = torch.func.jacrev(partial(answer, matrix))(u).reshape(12, 12)
        except Exception as error:  # the reader's code may raise anything
            return _raised(error)
        largest = max(largest, abs(float(linalg.slogdet(whole)[1])))
    if largest > 1e-10:
        return _wrong("e has the right value but another derivative; is something detached from the graph?")
    return Feedback(True, "log |det de/du| is 0 for weak and strong A: every J_i is I, and nothing repels.")


def corners() -> Tensor:
    """Return the past of the exercise on the determinant, the four corners of a square, ``(4, 2)``."""
    return torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)


def _wrong(message: str) -> Feedback:
    return Feedback(False, message)


def _raised(error: Exception) -> Feedback:
    return _wrong(f"your code raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _number(answer: Any, name: str) -> float | Feedback:
    try:
        value = float(answer)
    except (TypeError, ValueError, RuntimeError):
        return _wrong(f"{name} should be one number; this is {type(answer).__name__}.")
    return value if value == value and abs(value) != float("inf") else _wrong(f"{name} is {value}; it must be finite.")


def _tensor(make: Callable[..., Any], shape: tuple[int, ...], name: str, *args: Tensor) -> Tensor | Feedback:
    """Call ``make`` and return a float64 tensor of the given shape, or the feedback if that fails."""
    try:
        found = torch.as_tensor(make(*args), dtype=torch.float64).detach()
    except Exception as error:  # the reader's code may raise anything
        return _raised(error)
    if tuple(found.shape) != shape:
        return _wrong(f"{name} has shape {tuple(found.shape)}; it should be {shape}.")
    if not bool(torch.isfinite(found).all()):
        return _wrong(f"{name} is not finite.")
    return found


def _close(found: Tensor, exact: Tensor, tolerance: float) -> bool:
    return bool((found - exact).abs().max() <= tolerance * (1 + exact.abs().max()))
