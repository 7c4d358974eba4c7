// The infinite sequence in one dimension: u_n = mu(u_<n, u_n) + sigma z_n, solved token by token, and its mean field
// V (1 - a V)^2 = sigma^2, which has a solution only for a sigma^2 <= 4/27.
const sequenceMathematics = (() => {
  const CRITICAL = 4 / 27;
  const LARGEST = 1e4; // a path beyond this has escaped
  const POINTS = 513;

  /** Standard normal numbers from a seed: mulberry32 and the method of Box and Muller. */
  function normals(seed) {
    let state = seed >>> 0, spare = null;
    const uniform = () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let t = state;
      t = Math.imul(t ^ (t >>> 15), t | 1);
      t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
    return () => {
      if (spare !== null) {
        const z = spare;
        spare = null;
        return z;
      }
      const radius = Math.sqrt(-2 * Math.log(1 - uniform())), angle = 2 * Math.PI * uniform();
      spare = radius * Math.sin(angle);
      return radius * Math.cos(angle);
    };
  }

  /** The stable solution V of V (1 - a V)^2 = sigma^2; null beyond 4/27. */
  function meanField(a, sigma) {
    const target = sigma * sigma;
    if (a * target > CRITICAL) return null;
    const high = a > 0 ? 1 / (3 * a) : target;
    const V = lineMathematics.bisect(v => v * (1 - a * v) ** 2 < target, 0, high);
    return { V, margin: 1 - a * V, drift: (a * V) / (1 - a * V) };
  }

  /** One path, extended token by token, whose past is seen on a ball if there is a radius. The sums over the past are kept on a grid of u, so that each token costs O(grid) to bracket and O(n) to refine. */
  class Path {
    constructor(a, sigma, seed, radius = 0) {
      Object.assign(this, { a, sigma, seed, radius, tokens: [], held: [], noise: [], several: 0, left: false, draw: normals(seed) });
      this.size = 0; // the largest |u| so far
      this.sum = 0;
      this.spread = []; // running sample variance, centred on the running mean
      this.centre = []; // running mean
      this.squares = 0;
      this.cover(1);
    }

    get length() { return this.tokens.length; }

    /** Sums of the past on a grid that reaches to the given u. */
    cover(reach) {
      this.reach = reach;
      for (const name of ["top", "total", "first", "second"]) this[name] = new Float64Array(POINTS).fill(name === "top" ? -Infinity : 0);
      for (const token of this.held) this.add(token);
    }

    add(token) {
      const { a, reach, top, total, first, second } = this;
      for (let k = 0; k < POINTS; k++) {
        const logit = a * token * (-reach + (2 * reach * k) / (POINTS - 1));
        let weight = 1;
        if (logit > top[k]) {
          const shrink = Math.exp(top[k] - logit);
          total[k] *= shrink;
          first[k] *= shrink;
          second[k] *= shrink;
          top[k] = logit;
        } else weight = Math.exp(logit - top[k]);
        total[k] += weight;
        first[k] += weight * token;
        second[k] += weight * token * token;
      }
    }

    /** The next token: among the solutions found on the grid, the one with the smallest |u - eps|. */
    step() {
      if (this.left) return false;
      const eps = this.sigma * this.draw();
      const token = this.tokens.length ? this.solve(eps) : eps;
      this.noise.push(eps);
      this.tokens.push(token);
      const held = lineMathematics.hold(token, this.radius);
      this.held.push(held);
      this.size = Math.max(this.size, Math.abs(held));
      this.add(held);
      const n = this.tokens.length, before = n > 1 ? this.centre[n - 2] : 0, mean = before + (token - before) / n;
      this.squares += (token - before) * (token - mean);
      this.centre.push(mean);
      this.spread.push(this.squares / n);
      this.left = Math.abs(token) > LARGEST;
      return true;
    }

    solve(eps) {
      const needed = this.size + Math.abs(eps);
      if (needed > this.reach) this.cover(1.5 * needed + 1);
      const { a, reach, held, total, first, second } = this, gap = (2 * reach) / (POINTS - 1);
      const gapOf = u => lineMathematics.residual(held, a, u) - eps;
      const places = [];
      let x0 = 0, f0 = 0, J0 = 0;
      for (let k = 0; k < POINTS; k++) {
        const mean = first[k] / total[k], x = -reach + gap * k, f = x - mean - eps, J = 1 - a * (second[k] / total[k] - mean * mean);
        if (k > 0) {
          if (f0 < 0 !== f < 0) places.push([x0, x, f0 < 0, x0 - (f0 * gap) / (f - f0)]);
          else if (J0 < 0 !== J < 0 && Math.min(Math.abs(f0), Math.abs(f)) < 2 * gap * Math.max(1, Math.abs(J0), Math.abs(J))) {
            // A turning point between two points of the grid may hide two solutions.
            const turn = lineMathematics.bisect(u => lineMathematics.jacobian(held, a, u) < 0 === J0 < 0, x0, x);
            if (gapOf(turn) < 0 !== f < 0) places.push([x0, turn, f0 < 0, (x0 + turn) / 2], [turn, x, f >= 0, (turn + x) / 2]);
          }
        }
        [x0, f0, J0] = [x, f, J];
      }
      if (places.length > 1) this.several += 1;
      const distance = ([low, high]) => (low <= eps && eps <= high ? 0 : Math.min(Math.abs(low - eps), Math.abs(high - eps)));
      places.sort((p, q) => distance(p) - distance(q));
      let best = null;
      for (const place of places) {
        if (best !== null && distance(place) > Math.abs(best - eps)) break;
        const root = this.refine(eps, ...place);
        if (best === null || Math.abs(root - eps) < Math.abs(best - eps)) best = root;
      }
      return best;
    }

    /** Newton's method kept inside a bracket. */
    refine(eps, low, high, rises, guess) {
      const { a, held } = this;
      let u = guess;
      for (let k = 0; k < 100; k++) {
        const seen = lineMathematics.look(held, a, u), f = u - seen.mean - eps;
        if (f === 0) return u;
        if (f < 0 === rises) low = u;
        else high = u;
        let next = u - f / (1 - a * seen.variance);
        if (!(next > low && next < high)) next = (low + high) / 2;
        // The step shrinks quadratically: the next one would be lost in rounding.
        if (Math.abs(next - u) <= 1e-14 * (1 + Math.abs(u))) return next;
        u = next;
      }
      return u;
    }
  }

  return { CRITICAL, LARGEST, normals, meanField, Path };
})();
