// One dimension. Past tokens u_s, strict mask, logits a u u_s, weights alpha = softmax, mean mu = sum alpha_s u_s,
// residual map e(u) = u - mu(u), J(u) = 1 - a Var(u). All definitions are those of the Python library.
const lineMathematics = (() => {
  const FAR = 1e-6; // largest |1 - J| allowed outside the searched interval
  const LEVELS = 200;
  const MOST = 200000; // largest number of intervals of one level

  /** Weights, mean and central moments of the past for a token u. */
  function look(past, a, u, weights = null) {
    const n = past.length;
    if (n === 0) return { mean: 0, variance: 0, third: 0 };
    let top = -Infinity;
    for (let s = 0; s < n; s++) top = Math.max(top, a * u * past[s]);
    const first = past[0];
    let total = 0, mean = 0, variance = 0, third = 0;
    const alpha = weights || new Float64Array(n);
    for (let s = 0; s < n; s++) {
      alpha[s] = Math.exp(a * u * past[s] - top);
      total += alpha[s];
      mean += alpha[s] * (past[s] - first);
    }
    mean = first + mean / total;
    for (let s = 0; s < n; s++) {
      alpha[s] /= total;
      const gap = past[s] - mean, part = alpha[s] * gap * gap;
      variance += part;
      third += part * gap;
    }
    return { mean, variance, third };
  }

  const residual = (past, a, u) => u - look(past, a, u).mean;
  const jacobian = (past, a, u) => 1 - a * look(past, a, u).variance;

  function spread(past) {
    let low = Infinity, high = -Infinity;
    for (const token of past) {
      if (token < low) low = token;
      if (token > high) high = token;
    }
    return past.length ? { low, high, width: high - low } : { low: 0, high: 0, width: 0 };
  }

  /** M = a Var and its bounds on intervals; null where M vanishes everywhere. */
  function sensitivity(past, a) {
    const { low, high, width } = spread(past), pull = Math.abs(a) * width;
    if (past.length < 2 || !(pull > 0)) return null;
    // The fourth cumulant of a distribution on an interval of length D lies between -D^4 / 8 and D^4 / 12.
    const curvature = (width * pull ** 3) / 8;
    let reach = 1 / pull;
    for (let k = 0; k < LEVELS; k++, reach *= 2) {
      let largest = 0;
      for (const sign of [1, -1]) {
        const end = sign * a > 0 ? high : low, u = sign * reach, seen = look(past, a, u);
        // E[(g - g_end)^2] D_o / D_g, with g = a u_s.
        largest = Math.max(largest, (seen.variance + (seen.mean - end) ** 2) * a * a * (width / pull));
      }
      if (largest <= FAR) break;
    }
    const value = u => a * look(past, a, u).variance;
    return {
      reach, curvature, value,
      // M, M' and an upper bound of M on the interval of half-width half about centre.
      bound(centre, half) {
        const seen = look(past, a, centre), at = a * seen.variance, slope = a * a * seen.third;
        const smooth = at + Math.abs(slope) * half + 0.5 * curvature * half * half;
        const factor = Math.exp(Math.min(700, half * pull * Math.sign(at)));
        return { value: at, slope, bound: Math.min(smooth, factor * at) };
      },
      intervals() {
        const parts = [];
        for (let k = 0; k < 64; k++) parts.push([-reach + (2 * reach * k) / 64, -reach + (2 * reach * (k + 1)) / 64]);
        return parts;
      },
    };
  }

  /** Enclose the supremum of M = 1 - J over u by branch and bound; with a threshold, stop once it is on one side. */
  function largestSensitivity(past, a, threshold = null, tolerance = 1e-10) {
    const line = sensitivity(past, a);
    if (line === null) return { lower: 0, upper: 0, at: 0 };
    let parts = line.intervals(), best = 0, at = 2 * line.reach, settled = FAR, upper = Infinity;
    const floor = threshold === null ? -Infinity : Math.min(threshold, 1) * (1 - 1e-12);
    for (let level = 0; level < LEVELS; level++) {
      const seen = parts.map(([left, right]) => line.bound((left + right) / 2, (right - left) / 2));
      seen.forEach((part, k) => {
        if (part.value > best) [best, at] = [part.value, (parts[k][0] + parts[k][1]) / 2];
      });
      const drop = Math.max(best, FAR, floor), next = [];
      upper = best;
      seen.forEach((part, k) => {
        upper = Math.max(upper, part.bound);
        if (part.bound > drop) next.push(parts[k]);
        else settled = Math.max(settled, part.bound);
      });
      upper = Math.max(upper, settled);
      if (threshold !== null && (best > threshold || upper < threshold)) break;
      if (upper - best <= tolerance * (1 + best) || next.length === 0 || next.length > MOST) break;
      parts = next.flatMap(([left, right]) => [[left, (left + right) / 2], [(left + right) / 2, right]]);
    }
    return { lower: best, upper, at };
  }

  /** Every u where J changes sign, in increasing order. */
  function turningPoints(past, a) {
    const line = sensitivity(past, a);
    if (line === null || a < 0) return [];
    let parts = line.intervals();
    const smallest = 1e-12 * line.reach, brackets = [];
    for (let level = 0; level < LEVELS && parts.length; level++) {
      const next = [];
      for (const [left, right] of parts) {
        const half = (right - left) / 2, seen = line.bound((left + right) / 2, half);
        const change = Math.abs(seen.slope) * half + 0.5 * line.curvature * half * half;
        if (seen.bound < 1 || seen.value - change > 1) continue;
        if (Math.abs(seen.slope) > line.curvature * half) {
          // M is monotone here: one crossing at most.
          if ((line.value(left) - 1) * (line.value(right) - 1) <= 0) brackets.push([left, right]);
        } else if (half > smallest) {
          next.push([left, (left + right) / 2], [(left + right) / 2, right]);
        }
      }
      parts = next;
    }
    const points = brackets.map(([left, right]) => {
      const rising = line.value(right) > line.value(left);
      return bisect(u => line.value(u) > 1 !== rising, left, right);
    });
    points.sort((x, y) => x - y);
    return points.filter((point, k) => k === 0 || point !== points[k - 1]);
  }

  /** The point where a predicate turns from true to false, to the last bit. */
  function bisect(leftOf, low, high) {
    for (let k = 0; k < 200; k++) {
      const middle = (low + high) / 2;
      if (!(low < middle && middle < high)) break;
      if (leftOf(middle)) low = middle;
      else high = middle;
    }
    return (low + high) / 2;
  }

  /** Every u with e(u) = noise, in increasing order: one on each branch of the inverse that covers the noise. */
  function roots(past, a, noise, turning) {
    const ends = [-Infinity, ...turning.map(u => residual(past, a, u)), Infinity];
    const { low: least, high: most } = spread(past), found = [];
    for (let piece = 0; piece + 1 < ends.length; piece++) {
      const [low, high] = [ends[piece], ends[piece + 1]].sort((x, y) => x - y);
      if (!(low <= noise && noise < high)) continue;
      const from = piece > 0 ? turning[piece - 1] : noise + least - 1;
      const to = piece < turning.length ? turning[piece] : noise + most + 1;
      const rises = piece % 2 === 0;
      found.push(bisect(u => residual(past, a, u) < noise === rises, from, to));
    }
    return found;
  }

  /** 1 - Phi(x) without loss of digits: a series of positive terms, or a continued fraction in the tail. */
  function upperTail(x) {
    if (x < 0) return 1 - upperTail(-x);
    const density = Math.exp(-x * x / 2) / Math.sqrt(2 * Math.PI);
    if (x < 3) {
      let term = x, sum = x;
      for (let k = 3; term > 1e-17 * sum; k += 2) sum += term *= (x * x) / k;
      return 0.5 - density * sum;
    }
    let fraction = x;
    for (let k = 120; k >= 1; k--) fraction = x + k / fraction;
    return density / fraction;
  }

  /** P(low <= eps < high) for eps ~ N(0, sigma^2). */
  function probability(low, high, sigma) {
    const at = (x) => (x === Infinity ? 0 : x === -Infinity ? 1 : upperTail(x / sigma));
    return low > 0 ? at(low) - at(high) : at(-high) - at(-low);
  }

  /** Z, the mean number of roots, from the values of e at its turning points: exact. */
  function mass(past, a, sigma, turning) {
    const ends = [-Infinity, ...turning.map(u => residual(past, a, u)), Infinity];
    let total = 0;
    for (let piece = 0; piece + 1 < ends.length; piece++) {
      const [low, high] = [ends[piece], ends[piece + 1]].sort((x, y) => x - y);
      total += probability(low, high, sigma);
    }
    return total;
  }

  const normal = (e, sigma) => Math.exp(-0.5 * (e / sigma) ** 2) / (sigma * Math.sqrt(2 * Math.PI));

  // Gauss-Kronrod, 7 and 15 points: nodes, weights of Kronrod, weights of Gauss on every second node.
  const NODES = [0.991455371120812639206854697526329, 0.949107912342758524526189684047851,
    0.864864423359769072789712788640926, 0.741531185599394439863864773280788, 0.586087235467691130294144691693013,
    0.405845151377397166906606412076961, 0.207784955007898467600689403773245, 0];
  const KRONROD = [0.022935322010529224963732008058970, 0.063092092629978553290700663189204,
    0.104790010322250183839876322541518, 0.140653259715525918745189590510238, 0.169004726639267902826583426598550,
    0.190350578064785409913256402421014, 0.204432940075298892414161999234649, 0.209482141084727828012999174891714];
  const GAUSS = [0.129484966168869693270611432679082, 0.279705391489276667901467771423780,
    0.381830050505118944950369775488975, 0.417959183673469387755102040816327];

  function integrate(f, left, right, tolerance, depth = 0) {
    const centre = (left + right) / 2, half = (right - left) / 2;
    let fine = 0, coarse = 0;
    for (let k = 0; k < 8; k++) {
      const both = k === 7 ? f(centre) : f(centre - half * NODES[k]) + f(centre + half * NODES[k]);
      fine += KRONROD[k] * both;
      if (k % 2 === 1) coarse += GAUSS[(k - 1) / 2] * both;
    }
    if (Math.abs(fine - coarse) * half <= tolerance || depth > 24) return fine * half;
    return integrate(f, left, centre, tolerance / 2, depth + 1) + integrate(f, centre, right, tolerance / 2, depth + 1);
  }

  /** Integral of N(e(u)) without the Jacobian of the change of variables. */
  function massWithoutJacobian(past, a, sigma, turning) {
    const { low, high } = spread(past), edges = [low - 9 * sigma, high + 9 * sigma, ...turning];
    // The integrand varies most where e is a multiple of sigma, so panels end there.
    for (const times of [-6, -3, -1, 0, 1, 3, 6]) edges.push(...roots(past, a, times * sigma, turning));
    edges.sort((x, y) => x - y);
    let total = 0;
    for (let k = 0; k + 1 < edges.length; k++) {
      if (edges[k + 1] > edges[k]) {
        total += integrate(u => normal(residual(past, a, u), sigma), edges[k], edges[k + 1], 1e-10);
      }
    }
    return total;
  }

  /** A token as the memory holds it: on the ball of its radius, unchanged where the radius is 0. */
  const hold = (token, radius) => (radius > 0 ? token / Math.sqrt(1 + (token / radius) ** 2) : token);

  /** The regime of a sequence, exact in one dimension, by the rules of the library in its order. */
  function regime(queries, a, radius = 0) {
    const tokens = queries.map(token => hold(token, radius));
    const J = queries.map((u, i) => jacobian(tokens.slice(0, i), a, u));
    let position = J.findIndex(value => value < 0);
    if (position >= 0) {
      // Among several negative ones the library names the first.
      return { name: "folded", proved: true, position, reason: `the slope J is negative at ${position === tokens.length - 1 ? "the query" : `token ${position + 1}`}: some noise has several solutions` };
    }
    if (radius > 0 && Math.abs(a) * radius * radius * (1 + 16 * Number.EPSILON) < 1) {
      return { name: "certified", proved: true, position: null, reason: "the contraction |a|ρ² is below one: the map is one-to-one after every past" };
    }
    const size = tokens.reduce((most, token) => Math.max(most, Math.abs(token)), 0), unit = 16 * Number.EPSILON;
    let largest = 0;
    for (let i = 2; i < tokens.length; i++) {
      const past = tokens.slice(0, i), width = spread(past).width;
      const upto = past.reduce((most, token) => Math.max(most, Math.abs(token)), 0);
      largest = Math.max(largest, ((width + unit * upto) * (Math.abs(a) * width + unit * Math.abs(a) * upto)) / 4);
    }
    if (largest < 1) {
      return { name: "certified", proved: true, position: null, reason: "the contraction bound is below one, so the map is one-to-one for every next token" };
    }
    let undecided = false;
    for (let i = 2; i < tokens.length; i++) {
      const past = tokens.slice(0, i), bracket = largestSensitivity(past, a, 1), width = spread(past).width;
      const slack = unit * (1 + Math.abs(a)) * size, gap = Math.max(1e-300, Math.min(width, Math.abs(a) * width));
      const rounding = bracket.upper > 0 ? Math.min(1, 1e-12 + slack / gap) : 0;
      if (bracket.lower > 1 + rounding) {
        return { name: "folded", proved: true, position: i, witness: bracket.at,
          reason: `the slope J is negative for a next token near ${bracket.at.toFixed(3).replace("-", "−")} after ${i} tokens: some noise has several solutions` };
      }
      undecided = undecided || bracket.upper * (1 + rounding) >= 1;
    }
    if (!undecided) {
      return { name: "certified", proved: true, position: null, reason: "the largest a·Var over every next token is below one (enclosed), so the map is one-to-one" };
    }
    J.forEach((value, i) => { if (position < 0 || value < J[position]) position = i; });
    if (J[position] <= 0) {
      return { name: "folded", proved: false, position, reason: "the slope J is zero at a token, on the boundary: a fold is suspected, not proved" };
    }
    return { name: "regular", proved: false, position, reason: "within rounding of the boundary: no fold was seen, and none is excluded" };
  }

  return { look, residual, jacobian, spread, largestSensitivity, turningPoints, roots, probability, mass, normal,
    massWithoutJacobian, hold, regime, bisect };
})();
