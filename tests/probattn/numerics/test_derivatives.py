import pytest
import torch

from probattn.numerics.derivatives import first_order_only, pushforward


def curve(x, y):
    return x**2 * y, torch.sin(y)


class TestPushforward:
    def test_along_a_direction(self):
        x, y, t, s = (torch.tensor(value, dtype=torch.float64) for value in (3.0, 0.5, 2.0, -1.0))
        found = pushforward(curve, [x, y], [t, s])
        torch.testing.assert_close(found, torch.func.jvp(curve, (x, y), (t, s))[1])

    def test_a_missing_tangent_is_zero(self):
        x, y, t = (torch.tensor(value, dtype=torch.float64) for value in (3.0, 0.5, 2.0))
        zero = torch.zeros((), dtype=torch.float64)
        for given, whole in (([t, None], (t, zero)), ([None, t], (zero, t)), ([None, None], (zero, zero))):
            torch.testing.assert_close(pushforward(curve, [x, y], given), torch.func.jvp(curve, (x, y), whole)[1])

    def test_inside_forward_mode(self):
        x, one = torch.tensor(3.0, dtype=torch.float64), torch.ones((), dtype=torch.float64)

        def slope(x):
            return pushforward(lambda x: (x**3,), [x], [one])[0]

        assert float(torch.func.jvp(slope, (x,), (one,))[1]) == pytest.approx(18)

    def test_as_many_tangents_as_primals(self):
        x = torch.ones(())
        with pytest.raises(ValueError, match="zip"):
            pushforward(curve, [x, x], [x])


class TestFirstOrderOnly:
    def test_the_value_passes(self):
        gradient, origin = torch.tensor([1.0, 2.0]), torch.ones(2, requires_grad=True)
        found = first_order_only(gradient, origin, "the thing")
        assert torch.equal(found, gradient)
        assert found.data_ptr() != gradient.data_ptr()

    def test_a_derivative_raises_and_names_what_has_none(self):
        found = first_order_only(torch.ones(2), torch.ones(2, requires_grad=True), "the thing")
        with pytest.raises(RuntimeError, match="the thing is differentiable once; its second derivative was asked for"):
            found.sum().backward()

    def test_under_vmap(self):
        found = torch.func.vmap(lambda g, o: first_order_only(g, o, "x"))(torch.arange(3.0), torch.ones(3))
        assert found.tolist() == [0.0, 1.0, 2.0]
