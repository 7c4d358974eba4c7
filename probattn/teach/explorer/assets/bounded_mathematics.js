// The long run of a bounded memory: tokens see the past on a ball of radius rho, and the distribution of the tokens is a
// fixed point, found on a grid of u.
const boundedMathematics = (() => {
  const ROUNDS = 600;

  /** The mean square of the tokens in the long run; null where none is found or the map folds. */
  function meanSquare(a, sigma, radius, points = 401) {
    const reach = radius + 8 * sigma, step = (2 * reach) / (points - 1), half = (points - 1) / 2;
    const u = Float64Array.from({ length: points }, (_, k) => -reach + step * k);
    const held = u.map(value => lineMathematics.hold(value, radius));
    const tilt = Array.from({ length: half + 1 }, (_, k) => held.map(value => Math.exp(a * u[half + k] * value)));
    const normal = x => Math.exp(-0.5 * (x / sigma) ** 2) / (sigma * Math.sqrt(2 * Math.PI));
    let density = u.map(normal), steepest = 0;
    for (let round = 0; round < ROUNDS; round++) {
      const after = new Float64Array(points);
      let change = 0;
      steepest = 0;
      // The mean is odd and its slope even, and so is the density: half of the grid says everything.
      for (let k = 0; k <= half; k++) {
        const row = tilt[k];
        let [total, first, second] = [0, 0, 0];
        for (let j = 0; j < points; j++) {
          const weight = row[j] * density[j];
          total += weight;
          first += weight * held[j];
          second += weight * held[j] * held[j];
        }
        const mean = first / total, slope = a * (second / total - mean * mean);
        steepest = Math.max(steepest, slope);
        after[half + k] = normal(u[half + k] - mean) * (1 - slope);
        after[half - k] = after[half + k];
        change = Math.max(change, Math.abs(after[half + k] - density[half + k]));
      }
      density = after;
      if (change < 1e-13) return steepest < 1 ? density.reduce((sum, value, j) => sum + value * u[j] * u[j], 0) * step : null;
    }
    return null;
  }

  /** Points (a V, a sigma^2) of the long run at noise of every size up to a level, with the radius held. */
  function curve(a, radius, level) {
    const found = [];
    for (let k = 1; k <= 16; k++) {
      const target = (level * k) / 16, square = meanSquare(a, Math.sqrt(target / a), radius, 121);
      if (square !== null) found.push([a * square, target]);
    }
    return found;
  }

  return { meanSquare, curve };
})();
