// Two dimensions. Logits u_s^T A u, weights alpha, Sigma their covariance, J = I - Sigma A; matrices are [a, b, c, d] by
// rows. A = s_1 l_1 r_1^T + s_2 l_2 r_2^T with the singular vectors given by two angles; s_2 carries the sign of det A.
const planeMathematics = (() => {
  function matrix({ left, right, s1, s2 }) {
    const [c, s, C, S] = [Math.cos(left), Math.sin(left), Math.cos(right), Math.sin(right)];
    return [s1 * c * C + s2 * s * S, s1 * c * S - s2 * s * C, s1 * s * C - s2 * c * S, s1 * s * S + s2 * c * C];
  }

  /** Weights, mean and J at one point: two passes, full precision. */
  function look(past, A, u, weights = null) {
    const n = past.length;
    if (n === 0) return { mean: [0, 0], J: [1, 0, 0, 1], e: [...u] };
    const x = A[0] * u[0] + A[1] * u[1], y = A[2] * u[0] + A[3] * u[1]; // A u
    const alpha = weights || new Float64Array(n);
    let top = -Infinity, total = 0, mx = 0, my = 0;
    for (let s = 0; s < n; s++) top = Math.max(top, (alpha[s] = past[s][0] * x + past[s][1] * y));
    for (let s = 0; s < n; s++) total += alpha[s] = Math.exp(alpha[s] - top);
    for (let s = 0; s < n; s++) {
      alpha[s] /= total;
      mx += alpha[s] * past[s][0];
      my += alpha[s] * past[s][1];
    }
    let xx = 0, xy = 0, yy = 0;
    for (let s = 0; s < n; s++) {
      const gx = past[s][0] - mx, gy = past[s][1] - my;
      xx += alpha[s] * gx * gx;
      xy += alpha[s] * gx * gy;
      yy += alpha[s] * gy * gy;
    }
    const J = [1 - (xx * A[0] + xy * A[2]), -(xx * A[1] + xy * A[3]), -(xy * A[0] + yy * A[2]), 1 - (xy * A[1] + yy * A[3])];
    return { mean: [mx, my], J, e: [u[0] - mx, u[1] - my] };
  }

  const determinant = J => J[0] * J[3] - J[1] * J[2];

  /** 1 - the largest real eigenvalue of I - J; infinite where both are complex. */
  function spectral(J) {
    const [a, b, c, d] = [1 - J[0], -J[1], -J[2], 1 - J[3]];
    const half = (a + d) / 2, under = ((a - d) / 2) ** 2 + b * c;
    if (under >= 0) return 1 - (half + Math.sqrt(under));
    // Rounding splits a double eigenvalue into a pair: as in the library, a tiny imaginary part counts as none.
    const norm = Math.sqrt(a * a + b * b + c * c + d * d);
    return Math.sqrt(-under) <= 4 * Math.sqrt(Number.EPSILON) * norm ? 1 - half : Infinity;
  }

  /** sigma_min: the distance of J to the nearest singular matrix. */
  function singularValue(J) {
    const sum = Math.hypot(J[0] + J[3], J[1] - J[2]), gap = Math.hypot(J[0] - J[3], J[1] + J[2]);
    const largest = (sum + gap) / 2;
    // |det| / sigma_max keeps the digits that the difference of the two norms would lose.
    return largest > 0 ? Math.abs(determinant(J)) / largest : 0;
  }

  const MARGINS = { determinant, spectral, singular_value: singularValue };

  /** Margin of every token after the tokens before it. */
  const margins = (tokens, A, kind) => tokens.map((u, i) => MARGINS[kind](look(tokens.slice(0, i), A, u).J));

  /** Positions of the k smallest margins, the earlier one first among equals. */
  function supportTokens(values, k) {
    return values.map((value, i) => [value, i]).sort((x, y) => (x[0] === y[0] ? x[1] - y[1] : x[0] - y[0])).slice(0, k).map(pair => pair[1]);
  }

  function diameter(points) {
    let most = 0;
    for (let i = 0; i < points.length; i++) {
      for (let j = 0; j < i; j++) most = Math.max(most, Math.hypot(points[i][0] - points[j][0], points[i][1] - points[j][1]));
    }
    return most;
  }

  /** Bound on |1 - J| for every next token: diameters of the tokens and of A^T u_s, over 4. */
  function contractionBound(past, A) {
    if (past.length < 2) return 0;
    const pulled = past.map(([x, y]) => [A[0] * x + A[2] * y, A[1] * x + A[3] * y]);
    const size = past.reduce((most, u) => Math.max(most, Math.hypot(...u)), 0), unit = 24 * Number.EPSILON * size;
    return ((diameter(past) + unit * Math.SQRT2) * (diameter(pulled) + unit * Math.hypot(...A))) / 4;
  }

  /** Mean, determinant, spectral and singular-value margin on a grid of n x n points of the plane. */
  class Grid {
    constructor(size, reach) {
      this.size = size;
      this.reach = reach;
      this.points = Float64Array.from({ length: size }, (_, i) => -reach + (2 * reach * i) / (size - 1));
      for (const name of ["mx", "my", "determinant", "spectral", "singular_value"]) this[name] = new Float64Array(size * size);
    }

    /** exp(g . u) factors over the axes: 2 n exponentials per token instead of n^2. */
    fill(past, A) {
      const { size: n, points } = this, count = past.length;
      const column = [], row = [];
      for (const [x, y] of past) {
        const gx = A[0] * x + A[2] * y, gy = A[1] * x + A[3] * y;
        column.push(points.map(u => Math.exp(gx * u)));
        row.push(points.map(v => Math.exp(gy * v)));
      }
      const J = [1, 0, 0, 1];
      for (let j = 0; j < n; j++) {
        for (let i = 0; i < n; i++) {
          let total = 0, x1 = 0, y1 = 0, xx = 0, xy = 0, yy = 0;
          for (let s = 0; s < count; s++) {
            const w = column[s][i] * row[s][j], x = past[s][0], y = past[s][1];
            total += w;
            x1 += w * x;
            y1 += w * y;
            xx += w * x * x;
            xy += w * x * y;
            yy += w * y * y;
          }
          if (count) {
            x1 /= total;
            y1 /= total;
            xx = xx / total - x1 * x1;
            xy = xy / total - x1 * y1;
            yy = yy / total - y1 * y1;
          }
          J[0] = 1 - (xx * A[0] + xy * A[2]);
          J[1] = -(xx * A[1] + xy * A[3]);
          J[2] = -(xy * A[0] + yy * A[2]);
          J[3] = 1 - (xy * A[1] + yy * A[3]);
          const k = j * n + i;
          this.mx[k] = x1;
          this.my[k] = y1;
          this.determinant[k] = determinant(J);
          this.spectral[k] = spectral(J);
          this.singular_value[k] = singularValue(J);
        }
      }
      return this;
    }

    /** {det J = 0} as segments whose ends lie on the curve: marching squares, each crossing refined on its edge. */
    curve(past, A) {
      const { size: n, points, determinant: value } = this, segments = [];
      const at = (x, y) => determinant(look(past, A, [x, y]).J);
      const cross = new Map(); // an edge is shared by two squares
      const edge = (i, j, upwards) => {
        const key = 2 * (j * n + i) + upwards;
        if (!cross.has(key)) {
          const [di, dj] = upwards ? [0, 1] : [1, 0];
          const from = [points[i], points[j]], to = [points[i + di], points[j + dj]];
          const t = falsePosition(t => at(from[0] + t * (to[0] - from[0]), from[1] + t * (to[1] - from[1])), value[j * n + i], value[(j + dj) * n + i + di]);
          cross.set(key, [from[0] + t * (to[0] - from[0]), from[1] + t * (to[1] - from[1])]);
        }
        return cross.get(key);
      };
      for (let j = 0; j + 1 < n; j++) {
        for (let i = 0; i + 1 < n; i++) {
          const k = j * n + i;
          const a = value[k] < 0, b = value[k + 1] < 0, c = value[k + n + 1] < 0, d = value[k + n] < 0;
          if (a === b && b === c && c === d) continue;
          const met = [];
          if (a !== b) met.push(edge(i, j, 0));
          if (b !== c) met.push(edge(i + 1, j, 1));
          if (c !== d) met.push(edge(i, j + 1, 0));
          if (d !== a) met.push(edge(i, j, 1));
          if (met.length === 2) segments.push([met[0], met[1]]);
          else {
            // A saddle: the sign at the centre says which corners belong together.
            const middle = at((points[i] + points[i + 1]) / 2, (points[j] + points[j + 1]) / 2) < 0;
            segments.push(...(middle === a ? [[met[0], met[1]], [met[2], met[3]]] : [[met[0], met[3]], [met[1], met[2]]]));
          }
        }
      }
      return segments;
    }
  }

  /** The zero of f on [0, 1] from its values at the ends, which differ in sign (Illinois). */
  function falsePosition(f, f0, f1) {
    let [x0, x1] = [0, 1];
    for (let k = 0; k < 60; k++) {
      const x = (x0 * f1 - x1 * f0) / (f1 - f0), value = f(x);
      if (Math.abs(value) < 1e-13 || !(Math.abs(x1 - x0) > 1e-15)) return x;
      if ((value < 0) === (f1 < 0)) f0 /= 2;
      else [x0, f0] = [x1, f1];
      [x1, f1] = [x, value];
    }
    return x1;
  }

  /** Newton's method for e(u) = noise with step halving; null if it does not converge. */
  function newton(past, A, noise, start) {
    let u = [...start], seen = look(past, A, u), size = Math.hypot(seen.e[0] - noise[0], seen.e[1] - noise[1]);
    for (let k = 0; k < 60 && size > 1e-14; k++) {
      const det = determinant(seen.J), rx = seen.e[0] - noise[0], ry = seen.e[1] - noise[1];
      if (det === 0) return null;
      const step = [(seen.J[3] * rx - seen.J[1] * ry) / det, (seen.J[0] * ry - seen.J[2] * rx) / det];
      let better = false;
      for (let t = 1; t > 1e-6; t /= 2) {
        const next = [u[0] - t * step[0], u[1] - t * step[1]], ahead = look(past, A, next);
        const distance = Math.hypot(ahead.e[0] - noise[0], ahead.e[1] - noise[1]);
        if (distance < size) {
          [u, seen, size, better] = [next, ahead, distance, true];
          break;
        }
      }
      if (!better) break;
    }
    return size < 1e-11 ? u : null;
  }

  /** Solutions of e(u) = noise, searched from grid cells where both components change sign, from the tokens of the past, and from midpoints of solutions. */
  function roots(past, A, noise, grid) {
    const { size: n, points, mx, my } = grid, starts = [[...noise]], found = [];
    for (const token of past) starts.push([noise[0] + token[0], noise[1] + token[1]]);
    for (let j = 0; j + 1 < n; j++) {
      for (let i = 0; i + 1 < n; i++) {
        const k = j * n + i, x = points[i] - noise[0], y = points[j] - noise[1], step = points[1] - points[0];
        const right = x + step, upper = y + step;
        const px = (x - mx[k] < 0) + (right - mx[k + 1] < 0) + (x - mx[k + n] < 0) + (right - mx[k + n + 1] < 0);
        if (px === 0 || px === 4) continue;
        const py = (y - my[k] < 0) + (y - my[k + 1] < 0) + (upper - my[k + n] < 0) + (upper - my[k + n + 1] < 0);
        if (py !== 0 && py !== 4) starts.push([points[i] + step / 2, points[j] + step / 2]);
      }
    }
    for (let round = 0, from = 0; round < 3; round++) {
      for (const start of starts.splice(0, 200)) {
        const root = newton(past, A, noise, start);
        if (root && found.every(other => Math.hypot(root[0] - other[0], root[1] - other[1]) > 1e-6)) found.push(root);
      }
      const fresh = found.length;
      for (let i = from; i < fresh; i++) {
        for (let j = 0; j < i; j++) starts.push([(found[i][0] + found[j][0]) / 2, (found[i][1] + found[j][1]) / 2]);
      }
      from = fresh;
    }
    return found.sort((x, y) => x[0] - y[0] || x[1] - y[1]);
  }

  /** A point with det J < 0 on the grid or uphill from its most promising points; null where none is found. */
  function findFold(past, A, grid) {
    const { size: n, points, determinant: det, spectral: margin } = grid;
    let best = -1;
    for (let k = 0; k < n * n; k++) if (det[k] < 0 && (best < 0 || det[k] < det[best])) best = k;
    if (best >= 0) return [points[best % n], points[(best - (best % n)) / n]];
    const order = [];
    for (let j = 1; j + 1 < n; j++) {
      for (let i = 1; i + 1 < n; i++) {
        const k = j * n + i;
        if (margin[k] < 0.8 && margin[k] <= margin[k - 1] && margin[k] <= margin[k + 1] && margin[k] <= margin[k - n] && margin[k] <= margin[k + n]) order.push(k);
      }
    }
    order.sort((x, y) => margin[x] - margin[y]);
    for (const k of order.slice(0, 6)) {
      let u = [points[k % n], points[(k - (k % n)) / n]], low = margin[k];
      // Compass search towards smaller margins; the number of moves is limited, since a ridge may lead to infinity.
      for (let moves = 0, step = points[1] - points[0]; step > 1e-5 && moves < 100; moves++) {
        let moved = false;
        for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1], [1, 1], [-1, -1], [1, -1], [-1, 1]]) {
          const next = [u[0] + step * dx, u[1] + step * dy], J = look(past, A, next).J;
          if (determinant(J) < 0) return next;
          if (spectral(J) < low) {
            [u, low, moved] = [next, spectral(J), true];
            break;
          }
        }
        step *= moved ? 1.5 : 0.5;
      }
    }
    return null;
  }

  /** The regime of a sequence by the rules of the library; a fold found by search is passed in. */
  function regime(tokens, A, fold = null) {
    const blocks = tokens.map((u, i) => look(tokens.slice(0, i), A, u).J), det = blocks.map(determinant);
    const negative = det.findIndex(value => value < 0), name = i => (i === tokens.length - 1 ? "the query" : `token ${i + 1}`);
    if (negative >= 0) {
      return { name: "folded", proved: true, position: negative, reason: `the determinant of J is negative at ${name(negative)}: some noise has several solutions` };
    }
    const bound = tokens.reduce((most, _, i) => Math.max(most, contractionBound(tokens.slice(0, i), A)), 0);
    if (bound < 1) {
      return { name: "certified", proved: true, position: null, reason: "the contraction bound is below one, so the map is one-to-one for every next token" };
    }
    const values = blocks.map(spectral);
    const lowest = values.reduce((best, value, i) => (value < values[best] ? i : best), 0);
    if (fold) {
      const where = fold.at.map(x => x.toFixed(2).replace("-", "−")).join(", ");
      return { name: "folded", proved: true, position: fold.position, witness: fold.at, reason: `the determinant of J is negative at u = (${where}) after ${fold.position} tokens, found by search` };
    }
    if (values[lowest] <= 0) {
      return { name: "folded", proved: false, position: lowest, reason: `a real eigenvalue of J is not positive at ${name(lowest)}: a fold is suspected, not proved` };
    }
    return { name: "regular", proved: false, position: lowest, reason: "no fold was found, and none is excluded: the contraction bound does not certify" };
  }

  return { matrix, look, determinant, spectral, singularValue, MARGINS, margins, supportTokens, contractionBound, Grid, roots, findFold, regime };
})();
