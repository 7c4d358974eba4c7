"""Tables of the study of language models with known answers."""

import numpy as np
from xarray import Dataset

TEXTS, LAYERS, TOKENS = 16, 6, 56


def table(values, first=0, **more):
    """A table of (N, L, T) arrays by name, and of (N, T) arrays in ``more``."""
    shape = next(iter(values.values())).shape
    content = {name: (("sequence", "layer", "token"), part.astype(np.float32)) for name, part in values.items()}
    content |= {name: (("sequence", "token"), part.astype(np.float32)) for name, part in more.items()}
    coordinates = {"sequence": first + np.arange(shape[0]), "layer": np.arange(shape[1]), "token": np.arange(shape[2])}
    return Dataset(content, coords=coordinates)


def location_tables(volume, nearest, *, seed=0, texts=TEXTS, shared=0.5):
    """Trained blocks whose volume and smallest singular value differ from those of two controls, by layer.

    Texts share an effect of their own in all groups, so that tokens of one text are not independent.
    """
    rng = np.random.default_rng(seed)
    shape = (texts, LAYERS, TOKENS)
    effect = shared * rng.normal(size=(texts, LAYERS, 1))

    def group(shift, near):
        logabsdet = np.asarray(shift)[None, :, None] + effect + rng.normal(size=shape)
        smallest = 0.6 + np.asarray(near)[None, :, None] + 0.02 * rng.normal(size=shape)
        sign = np.where(rng.uniform(size=shape) < 0.02, -1.0, 1.0)
        return (
            table({"sign": sign, "logabsdet": logabsdet, "sigma_min": smallest, "update_sign": sign}),
            table({"spectral": smallest + 0.2, "complex": smallest + 0.1}),
        )

    zero = np.zeros(LAYERS)
    groups = {"text": (volume, nearest), "random_weights": (zero, zero), "turned_output": (zero, zero)}
    groups["shuffled_text"] = (volume, nearest)
    found = {}
    for name, shifts in groups.items():
        found[name], found[f"{name}-eigenvalues"] = group(*shifts)
    return found


def prediction_tables(strength, *, through_entropy=0.0, seed=0, texts=TEXTS):
    """Tokens whose divergence depends on the generator's log sigma_min, on their entropy, or on neither."""
    rng = np.random.default_rng(seed)
    shape = (texts, TOKENS)
    entropy = rng.uniform(0, 5, shape)
    common = rng.normal(size=shape) + through_entropy * (entropy - 2.5)  # of the margins of all layers
    logs = common[:, None] + 0.3 * rng.normal(size=(texts, LAYERS, TOKENS))

    def noise():
        return rng.normal(size=(texts, LAYERS, TOKENS))

    text = table(
        {
            "sigma_min": np.exp(-logs - 4),
            "logabsdet": noise(),
            "update_sigma_min": np.exp(-np.abs(noise())),
            "update_logabsdet": noise(),
        },
        surprisal=rng.exponential(size=shape),
        entropy=entropy,
    )
    eigenvalues = table({name: noise() for name in ("spectral", "complex", "update_spectral", "update_complex")})
    target = strength * common + entropy + rng.normal(size=shape)
    names = (
        "head_alone_sigma_min",
        "head_alone_logabsdet",
        "turned_head_alone_sigma_min",
        "turned_head_alone_logabsdet",
    )
    content = {name: rng.normal(size=shape) for name in (*names, "norm")}
    content |= {name: target + 0.2 * rng.normal(size=shape) for name in ("local_all", "local_last")}
    content |= {name: np.exp(target) for name in ("kl_all_0.1", "kl_all_0.3", "kl_last_0.1")}
    shown = {name: (("sequence", "token"), values) for name, values in content.items()}
    coordinates = {"sequence": np.arange(texts), "token": np.arange(TOKENS)}
    return {"text": text, "text-eigenvalues": eigenvalues, "noise": Dataset(shown, coords=coordinates)}
