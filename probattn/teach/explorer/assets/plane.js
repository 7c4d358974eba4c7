// The view of two dimensions: tokens in the plane, a map of the margin over the positions of the query, the curve
// det J = 0, the query's attention, its other solutions, and the support tokens of the sequence.
const planeView = page => {
  const M = planeMathematics, { ink } = draw, { round } = controls;
  const canvas = controls.find("plane-canvas"), layer = controls.find("plane-handles"), bar = controls.find("plane-bar");
  const REACH = 3.5;
  // Colours never saturate: x / (1 + |x|) puts every number, however large, in its own place, and 1 half way.
  const place = x => x / (1 + Math.abs(x)), TICKS = { signed: [-9, -2, 0, 2, 9], distance: [0, 0.5, 1, 2, 9] };
  const fine = new M.Grid(181, REACH), coarse = new M.Grid(91, REACH), search = new M.Grid(49, REACH);
  const image = document.createElement("canvas"), editor = matrixEditor(page);
  let x = null, y = null, seen = null, key = "", grid = fine, folds = { key: "", found: null, complete: false };

  const state = () => page.state.plane;

  function compute(settled) {
    const at = state(), A = M.matrix(at), past = at.tokens.slice(0, -1), u = at.tokens.at(-1);
    const wanted = JSON.stringify([past, A]);
    // Half the resolution while something other than the query moves; full resolution once it stops.
    if (wanted !== key || (settled && grid !== fine)) {
      const changed = wanted !== key;
      grid = settled ? fine : coarse;
      key = wanted;
      grid.fill(past, A);
      grid.segments = grid.curve(past, A);
      if (changed) folds = { key, found: fold(past, A, grid), complete: false };
    }
    if (settled && !folds.complete) searchAll(at.tokens, A);
    const weights = new Float64Array(past.length), here = M.look(past, A, u, weights);
    const margins = M.margins(at.tokens, A, at.kind), det = M.determinant(here.J);
    return {
      A, past, u, weights, ...here, det, spectral: M.spectral(here.J), sigma: M.singularValue(here.J),
      bound: M.contractionBound(past, A), margins, support: M.supportTokens(margins, Math.min(at.support, at.tokens.length)),
      roots: M.roots(past, A, here.e, grid), regime: M.regime(at.tokens, A, folds.found),
    };
  }

  const fold = (past, A, sampled) => {
    const at = M.contractionBound(past, A) < 1 ? null : M.findFold(past, A, sampled);
    return at && { at, position: past.length };
  };

  /** Search for folds after shorter pasts too, the longest first, once nothing moves. */
  function searchAll(tokens, A) {
    folds.complete = true;
    for (let i = tokens.length - 2; i >= 2 && !folds.found; i--) {
      const past = tokens.slice(0, i);
      if (M.contractionBound(past, A) < 1) break; // then no shorter past folds either
      folds.found = fold(past, A, search.fill(past, A));
    }
  }

  function numbers() {
    const s = seen, at = state();
    s.A.forEach((value, k) => controls.show(`plane.A${k}`, value));
    s.J.forEach((value, k) => controls.show(`plane.J${k}`, value));
    controls.show("plane.u", [s.u]);
    controls.show("plane.mean", [s.mean]);
    controls.show("plane.e", [s.e]);
    controls.show("plane.determinant", s.det);
    controls.show("plane.spectral", s.spectral);
    controls.show("plane.singular_value", s.sigma);
    controls.show("plane.gain", s.sigma === 0 ? Infinity : 1 / s.sigma);
    controls.show("plane.barrier", s.det === 0 ? Infinity : -Math.log(Math.abs(s.det)));
    controls.show("plane.bound", s.bound);
    controls.show("plane.count", s.roots.length);
    controls.show("plane.roots", s.roots);
    controls.find("plane-complex").hidden = Number.isFinite(s.spectral);
    controls.find("plane-even").hidden = s.roots.length % 2 === 1;
    controls.show("plane.support", s.support.map(i => i + 1));
    controls.show("plane.supportMargins", s.support.map(i => s.margins[i]));
    if (controls.find("plane-table").open) {
      controls.table(controls.find("plane-rows"), at.tokens.map((token, i) => {
        const query = i === at.tokens.length - 1;
        return [query ? "u" : String(i + 1), token[0], token[1], query ? "" : s.weights[i], s.margins[i]];
      }));
    }
    return controls.showRegime("plane", s.regime);
  }

  function paint() {
    const { pen, width, height } = draw.surface(canvas), at = state(), s = seen, n = grid.size;
    x = draw.scale(-REACH, REACH, 0, width);
    y = draw.scale(-REACH, REACH, height, 0);
    const values = grid[at.kind], low = at.kind === "singular_value" ? 0 : -1, table = draw.palette(at.kind);
    if (image.width !== n) image.width = image.height = n;
    const brush = image.getContext("2d"), pixels = brush.createImageData(n, n), cells = new Uint32Array(pixels.data.buffer);
    for (let j = 0; j < n; j++) {
      for (let i = 0; i < n; i++) {
        const value = values[j * n + i], part = Number.isFinite(value) ? place(value) : Math.sign(value);
        cells[(n - 1 - j) * n + i] = table[Math.min(255, Math.floor((256 * (part - low)) / (1 - low)))];
      }
    }
    brush.putImageData(pixels, 0, 0);
    // Samples are points, pixels are areas: the image extends half a cell on each side.
    const cell = width / (n - 1);
    pen.drawImage(image, -cell / 2, -cell / 2, width + cell, height + cell);

    pen.lineWidth = 1;
    for (let k = -3; k <= 3; k++) {
      [pen.strokeStyle, pen.globalAlpha] = [ink.ink, k === 0 ? 0.35 : 0.1];
      draw.stroke(pen, [[x(k), 0], [x(k), height]]);
      draw.stroke(pen, [[0, y(k)], [width, y(k)]]);
      pen.globalAlpha = 1;
      if (k && width > 300) {
        draw.text(pen, draw.tickText(k, 0), x(k), y(0) + 3, { align: "center", base: "top", factor: 0.7 });
        draw.text(pen, draw.tickText(k, 0), x(0) - 4, y(k), { align: "right", base: "middle", factor: 0.7 });
      }
    }

    pen.beginPath();
    for (const [from, to] of grid.segments) {
      pen.moveTo(x(from[0]), y(from[1]));
      pen.lineTo(x(to[0]), y(to[1]));
    }
    [pen.strokeStyle, pen.lineWidth] = [ink.paper, 5];
    pen.stroke();
    [pen.strokeStyle, pen.lineWidth] = [ink.ink, 2.5];
    pen.stroke();

    s.past.forEach((token, i) => {
      if (s.weights[i] < 0.002) return;
      pen.globalAlpha = 0.25 + 0.75 * s.weights[i];
      draw.curve(pen, [[x(s.u[0]), y(s.u[1])], [x(token[0]), y(token[1])]], ink.ink, 0.5 + 7 * s.weights[i]);
      pen.globalAlpha = 1;
    });
    // The residual e = u - mu.
    draw.curve(pen, [[x(s.mean[0]), y(s.mean[1])], [x(s.u[0]), y(s.u[1])]], ink.green, 2.5, [6, 4]);
    pen.beginPath();
    pen.arc(x(s.mean[0]), y(s.mean[1]), 4.5, 0, 7);
    [pen.fillStyle, pen.strokeStyle, pen.lineWidth] = [ink.green, ink.paper, 2];
    pen.stroke();
    pen.fill();
    for (const root of s.roots) {
      if (Math.hypot(root[0] - s.u[0], root[1] - s.u[1]) > 1e-5) draw.diamond(pen, x(root[0]), y(root[1]), 7, ink.green);
    }
    handles.update(at.tokens.length);
    paintBar(low, table);
    editor.render();
  }

  function paintBar(low, table) {
    const { pen, width, height } = draw.surface(bar), tall = height - ink.size * 1.2;
    const scale = draw.scale(low, 1, 1, width - 1);
    for (let k = 0; k < width; k++) {
      const colour = table[Math.min(255, Math.floor((k / width) * 256))];
      pen.fillStyle = `rgb(${colour & 255}, ${(colour >> 8) & 255}, ${(colour >> 16) & 255})`;
      pen.fillRect(k, 0, 1.5, tall);
    }
    [pen.strokeStyle, pen.lineWidth] = [ink.rule, 1];
    pen.strokeRect(0.5, 0.5, width - 1, tall - 1);
    for (const at of TICKS[low < 0 ? "signed" : "distance"]) {
      draw.text(pen, String(at).replace("-", "−"), scale(place(at)), height - 1, { align: at === 0 && low === 0 ? "left" : "center", factor: 0.75 });
    }
  }

  const last = () => state().tokens.length - 1;
  const handles = new controls.Handles(layer, {
    label: k => (k === last() ? "query u" : `token ${k + 1}`) + (seen.support.includes(k) ? ", support token" : ""),
    className: k => (k === last() ? "query" : "token") + (seen.support.includes(k) ? " support" : ""),
    value(k) {
      const [px, py] = state().tokens[k];
      return { now: px, text: `x ${controls.format(px)}, y ${controls.format(py)}` };
    },
    place: k => [x(state().tokens[k][0]), y(state().tokens[k][1])],
    move(k, { pixels, step }) {
      const limit = states.LIMIT.token, token = state().tokens[k];
      const next = pixels ? [x.invert(pixels[0]), y.invert(pixels[1])] : [token[0] + step[0], token[1] + step[1]];
      state().tokens[k] = next.map(value => states.clamp(round(value), -limit, limit));
      page.changed();
    },
    remove(k) {
      if (state().tokens.length > 2) state().tokens.splice(k, 1);
      page.changed();
    },
    done: () => page.commit(),
  });

  function insert(token) {
    const { tokens } = state(), limit = states.LIMIT.token;
    if (tokens.length >= states.LIMIT.tokens) return;
    tokens.splice(tokens.length - 1, 0, token.map(value => states.clamp(round(value), -limit, limit)));
    page.changed();
    page.commit();
  }
  canvas.addEventListener("dblclick", event => insert([x.invert(event.offsetX), y.invert(event.offsetY)]));
  controls.find("plane-add").addEventListener("click", () => {
    // On a spiral by the golden angle, away from the earlier tokens.
    const k = state().tokens.length, radius = 0.5 * Math.sqrt(k);
    insert([radius * Math.cos(2.4 * k), radius * Math.sin(2.4 * k)]);
  });
  controls.find("plane-remove").addEventListener("click", () => {
    handles.remove(last() - 1);
    page.commit();
  });
  controls.find("plane-kind").addEventListener("change", event => {
    state().kind = event.target.value;
    page.changed();
    page.commit();
  });
  const support = controls.slider("plane-support", () => state().support, value => (state().support = value), page.changed, page.commit);

  return {
    render(settled) {
      seen = compute(settled);
      support();
      const kind = controls.find("plane-kind");
      if (kind.value !== state().kind) kind.value = state().kind;
      const news = numbers();
      paint();
      return news;
    },
    /** Points on det J = 0, for the tests. */
    curve: () => grid.segments.flat().map(point => [...point]),
    witness: () => (folds.found ? { at: [...folds.found.at], position: folds.found.position } : null),
  };
};
