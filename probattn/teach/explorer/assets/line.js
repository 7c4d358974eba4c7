// The view of one dimension: tokens on a line, the residual map with its folds, the density of the next token. The last
// token of the sequence is the query u; the tokens before it are its past.
const lineView = page => {
  const M = lineMathematics, { ink } = draw, { round } = controls;
  const canvas = controls.find("line-canvas"), layer = controls.find("line-handles");
  const SAMPLES = 401, REACH = 4.2;
  let x = null, bands = null, seen = null;

  const state = () => page.state.line;

  /** Compute all displayed quantities from the state. */
  function compute() {
    const { tokens, a, sigma, noise, radius } = state(), u = tokens.at(-1);
    const past = tokens.slice(0, -1).map(token => M.hold(token, radius));
    const weights = new Float64Array(past.length), here = M.look(past, a, u, weights), J = 1 - a * here.variance, e = u - here.mean;
    const turning = M.turningPoints(past, a), naive = M.normal(e, sigma);
    return {
      past, u, weights, J, e, turning, mean: here.mean, variance: here.variance,
      roots: M.roots(past, a, noise, turning), mass: M.mass(past, a, sigma, turning),
      without: M.massWithoutJacobian(past, a, sigma, turning), naive, density: naive * Math.abs(J),
      largest: M.largestSensitivity(past, a), regime: M.regime(tokens, a, radius),
    };
  }

  function numbers() {
    const s = seen, at = state();
    controls.show("line.u", s.u);
    controls.show("line.mean", s.mean);
    controls.show("line.e", s.e);
    controls.show("line.variance", s.variance);
    controls.show("line.margin", s.J);
    controls.show("line.sigma_min", Math.abs(s.J));
    controls.show("line.gain", s.J === 0 ? Infinity : 1 / Math.abs(s.J));
    controls.show("line.barrier", s.J === 0 ? Infinity : -Math.log(Math.abs(s.J)));
    controls.show("line.smallest", 1 - s.largest.lower);
    controls.show("line.turning", s.turning);
    controls.show("line.count", s.roots.length);
    controls.show("line.roots", s.roots);
    controls.show("line.mass", s.mass);
    controls.show("line.without", s.without);
    controls.show("line.density", s.density);
    controls.show("line.naive", s.naive);
    if (controls.find("line-table").open) {
      controls.table(controls.find("line-rows"), at.tokens.map((token, i) => {
        const query = i === at.tokens.length - 1;
        return [query ? "u" : `u${subscript(i + 1)}`, token, query ? "" : s.weights[i], M.jacobian(at.tokens.slice(0, i).map(one => M.hold(one, at.radius)), at.a, token)];
      }));
    }
    return controls.showRegime("line", s.regime);
  }

  const subscript = n => String(n).replace(/\d/g, d => "₀₁₂₃₄₅₆₇₈₉"[d]);

  function layout(pen, width, height) {
    const left = ink.size * 3, right = width - ink.size * 0.8, wide = right - left;
    const strip = draw.heading(pen, wide, "tokens", [[ink.blue, "area: attention weight"]]);
    const map = draw.heading(pen, wide, "residual map e(u) = u − μ(u)", [[ink.green, "noise ε and its roots"], [ink.orange, "folded"], [ink.muted, "no attention, e = u"]]);
    const density = draw.heading(pen, wide, "density of the next token", [[ink.blue, "N(e) |J|"], [ink.pink, "N(e) alone"]]);
    const top = ink.size * 5 + strip.more + map.more, bottom = height - ink.size * 2, middle = top + (bottom - top - density.more) * 0.57;
    x = draw.scale(-REACH, REACH, left, right);
    bands = {
      strip: ink.size * 2.65 + strip.more,
      map: draw.scale(-REACH, REACH, middle - ink.size * 0.6, top),
      density: [bottom, middle + density.more + ink.size * 1.6],
    };
    return { strip, map, density };
  }

  function paint() {
    const { pen, width, height } = draw.surface(canvas), { a, sigma, noise, tokens } = state(), s = seen;
    const heads = layout(pen, width, height), y = bands.map, points = [], folded = [];
    for (let k = 0; k < SAMPLES; k++) {
      const u = -REACH + (2 * REACH * k) / (SAMPLES - 1), here = M.look(s.past, a, u);
      points.push({ u, e: u - here.mean, J: 1 - a * here.variance });
    }
    for (const u of [...s.turning, s.u]) {
      if (Math.abs(u) > REACH) continue;
      const here = M.look(s.past, a, u);
      points.push({ u, e: u - here.mean, J: u === s.u ? s.J : 0 });
    }
    points.sort((p, q) => p.u - q.u);

    // Bands where the map decreases.
    for (let k = 0; k + 1 < s.turning.length; k += 2) folded.push([x(Math.max(-REACH, s.turning[k])), x(Math.min(REACH, s.turning[k + 1]))]);
    pen.fillStyle = ink.orange;
    pen.globalAlpha = 0.13;
    for (const [from, to] of folded) pen.fillRect(from, y.to, Math.max(1, to - from), bands.density[0] - y.to);
    pen.globalAlpha = 1;

    // The strip of tokens: areas are attention weights.
    heads.strip.paint(x.from, ink.size * 1.3 + heads.strip.more);
    draw.curve(pen, [[x.from, bands.strip], [x.to, bands.strip]], ink.rule, 1.5);
    s.past.forEach((token, i) => {
      pen.beginPath();
      pen.arc(x(token), bands.strip, ink.size * (0.3 + 1.1 * Math.sqrt(s.weights[i])), 0, 7);
      [pen.fillStyle, pen.globalAlpha] = [ink.blue, 0.3];
      pen.fill();
      pen.globalAlpha = 1;
    });

    // The residual map.
    draw.axes(pen, x, y, { xNumbers: false });
    draw.clip(pen, x, y, () => {
      draw.curve(pen, [[x(-REACH), y(-REACH)], [x(REACH), y(REACH)]], ink.muted, 1.5, [2, 5]);
      draw.curve(pen, [[x.from, y(noise)], [x.to, y(noise)]], ink.green, 1.5, [7, 5]);
      for (let k = 0; k + 1 < points.length; ) {
        const back = (points[k].J + points[k + 1].J) / 2 < 0, run = [[x(points[k].u), y(points[k].e)]];
        while (k + 1 < points.length && (points[k].J + points[k + 1].J) / 2 < 0 === back) run.push([x(points[++k].u), y(points[k].e)]);
        draw.curve(pen, run, back ? ink.orange : ink.blue, 3);
      }
      draw.curve(pen, [[x(s.u), bands.strip], [x(s.u), y(s.e)]], ink.ink, 1, [2, 4]);
    });
    draw.clip(pen, { from: x.from - 9, to: x.to + 9 }, { from: y.from + 9, to: y.to - 9 }, () => {
      for (const root of s.roots) draw.diamond(pen, x(root), y(noise), 7, ink.green);
      pen.beginPath();
      pen.arc(x(s.u), y(s.e), 5, 0, 7);
      pen.fillStyle = ink.ink;
      pen.fill();
    });
    heads.map.paint(x.from, y.to);

    // Both densities of the next token.
    const exact = points.map(p => M.normal(p.e, sigma) * Math.abs(p.J)), naive = points.map(p => M.normal(p.e, sigma));
    const tallest = Math.max(...exact, ...naive, 1e-3), z = draw.scale(0, tallest * 1.12, ...bands.density);
    draw.axes(pen, x, z, { yMost: 3 });
    draw.clip(pen, x, z, () => {
      pen.beginPath();
      pen.moveTo(x(points[0].u), z(0));
      points.forEach((p, k) => pen.lineTo(x(p.u), z(exact[k])));
      pen.lineTo(x(points.at(-1).u), z(0));
      [pen.fillStyle, pen.globalAlpha] = [ink.blue, 0.18];
      pen.fill();
      pen.globalAlpha = 1;
      draw.curve(pen, points.map((p, k) => [x(p.u), z(exact[k])]), ink.blue, 2.5);
      draw.curve(pen, points.map((p, k) => [x(p.u), z(naive[k])]), ink.pink, 2, [6, 4]);
      draw.curve(pen, [[x(s.u), z(0)], [x(s.u), z(s.density)]], ink.ink, 1, [2, 4]);
    });
    heads.density.paint(x.from, z.to);
    handles.update(tokens.length);
  }

  const handles = new controls.Handles(layer, {
    label: k => (k === state().tokens.length - 1 ? "query u" : `token ${k + 1}`),
    className: k => (k === state().tokens.length - 1 ? "query" : "token"),
    value: k => ({ now: state().tokens[k], text: controls.format(state().tokens[k]) }),
    place: k => [x(state().tokens[k]), bands.strip],
    move(k, { pixels, step }) {
      const tokens = state().tokens, limit = states.LIMIT.token;
      const next = pixels ? x.invert(pixels[0]) : tokens[k] + step[0] + step[1];
      tokens[k] = states.clamp(round(next), -limit, limit);
      page.changed();
    },
    remove(k) {
      if (state().tokens.length > 2) state().tokens.splice(k, 1);
      page.changed();
    },
    done: () => page.commit(),
  });

  const sync = [
    controls.slider("line-a", () => state().a, value => (state().a = value), page.changed, page.commit),
    controls.slider("line-sigma", () => state().sigma, value => (state().sigma = value), page.changed, page.commit),
    controls.slider("line-radius", () => state().radius ?? 0, value => (state().radius = value), page.changed, page.commit),
    controls.slider("line-noise", () => state().noise, value => (state().noise = value), page.changed, page.commit),
  ];
  controls.find("line-take").addEventListener("click", () => {
    state().noise = states.clamp(seen.e, -states.LIMIT.noise, states.LIMIT.noise);
    page.changed();
    page.commit();
  });
  const insert = at => {
    const tokens = state().tokens;
    if (tokens.length >= states.LIMIT.tokens) return;
    tokens.splice(tokens.length - 1, 0, states.clamp(round(at), -states.LIMIT.token, states.LIMIT.token));
    page.changed();
    page.commit();
  };
  canvas.addEventListener("dblclick", event => insert(x.invert(event.offsetX)));
  controls.find("line-add").addEventListener("click", () => insert(newPlace(state().tokens)));
  controls.find("line-remove").addEventListener("click", () => {
    handles.remove(state().tokens.length - 2);
    page.commit();
  });

  /** In the widest gap between -3 and 3. */
  function newPlace(tokens) {
    const sorted = [-states.LIMIT.token, ...tokens, states.LIMIT.token].sort((p, q) => p - q);
    let best = 0;
    sorted.forEach((_, k) => { if (k && sorted[k] - sorted[k - 1] > sorted[best + 1] - sorted[best]) best = k - 1; });
    return (sorted[best] + sorted[best + 1]) / 2;
  }

  return {
    render() {
      seen = compute();
      sync.forEach(update => update());
      const news = numbers();
      paint();
      return news;
    },
  };
};
