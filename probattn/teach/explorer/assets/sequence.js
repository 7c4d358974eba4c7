// The view of the infinite sequence: a path computed on demand, its spread against the mean-field value, and the curve
// V (1 - a V)^2, whose maximum 4/27 is the end of stationarity.
const sequenceView = page => {
  const M = sequenceMathematics, { ink } = draw, canvas = controls.find("sequence-canvas"), play = controls.find("sequence-play");
  let path = null, playing = false;
  const state = () => page.state.sequence;
  const gone = "none";

  function compute() {
    const { a, sigma, seed, n } = state();
    if (!path || path.a !== a || path.sigma !== sigma || path.seed !== seed || path.length > n) path = new M.Path(a, sigma, seed);
    // Long paths are computed in parts, so that the page stays responsive.
    const until = performance.now() + 12;
    while (path.length < n && !path.left && performance.now() < until) path.step();
    if (path.length < n && !path.left) requestAnimationFrame(() => page.changed());
    return { field: M.meanField(a, sigma), level: a * sigma * sigma };
  }

  function numbers({ field, level }) {
    const n = path.length, last = list => (n ? list[n - 1] : null), { a } = state();
    controls.show("sequence.level", level);
    controls.show("sequence.n", n);
    controls.show("sequence.last", last(path.tokens), "–");
    controls.show("sequence.mean", last(path.centre), "–");
    controls.show("sequence.spread", last(path.spread), "–");
    controls.show("sequence.sampled", n ? 1 - a * last(path.spread) : null, "–");
    controls.show("sequence.several", path.several);
    controls.show("sequence.V", field && field.V, "none: a σ² > 4/27");
    controls.show("sequence.margin", field && field.margin, gone);
    controls.show("sequence.drift", field && field.drift, gone);
    const place = controls.find("sequence-place"), top = 0.4;
    place.style.left = `${100 * states.clamp(level / top, 0, 1)}%`;
    const below = level <= M.CRITICAL;
    let words = "Above 4/27 there is no stationary spread.";
    if (path.left) words = `The path has escaped: |u| > 10 000 at token ${n}. Play restarts it.`;
    else if (n >= states.LIMIT.sequence.n) words = `This page stops a path after ${n} tokens. Play restarts it.`;
    else if (level <= 0) words = "Without attraction every noise has a stationary spread.";
    else if (below) words = "Below 4/27 mean field has a stationary spread, but the mean still drifts.";
    controls.show("sequence.verdict", words);
    controls.find("sequence-gauge").className = below ? "gauge below" : "gauge above";
    return words;
  }

  /** Thin a curve to about one point per pixel, keeping the extremes. */
  function thinned(values, width) {
    const n = values.length, each = Math.max(1, Math.floor(n / Math.max(50, width)));
    if (each === 1) return values.map((value, i) => [i + 1, value]);
    const kept = [];
    for (let from = 0; from < n; from += each) {
      let [low, high] = [from, from];
      for (let i = from; i < Math.min(n, from + each); i++) {
        if (values[i] < values[low]) low = i;
        if (values[i] > values[high]) high = i;
      }
      for (const i of low < high ? [low, high] : [high, low]) kept.push([i + 1, values[i]]);
    }
    return kept;
  }

  function paint({ field, level }) {
    const { pen, width, height } = draw.surface(canvas), { a } = state(), n = path.length, size = ink.size;
    const left = size * 3.4, right = width - size * 0.8, gap = size * 3.4;
    const spread = path.spread.slice(1), high = Math.max(field ? 2 * field.V : 1, 1.1 * Math.max(0, ...tail(spread))), log = high > 30;
    const heads = [
      ["path u\u2099", [[ink.orange, "mean so far"], ...(field ? [[ink.green, "mean ± 2√V"]] : [])]],
      [log ? "log₁₀ of the sample variance" : "sample variance so far", field ? [[ink.green, "mean field V"]] : []],
      ["aV (1 − aV)² against aV", [[ink.orange, "a σ²"], [ink.blue, "aV of the sample"]]],
    ].map(([title, legend]) => draw.heading(pen, right - left, title, legend));
    const rest = height - size * 3.8 - 2 * gap - heads.reduce((sum, head) => sum + head.more, 0);
    let top = size * 1.8;
    const bands = [0.42, 0.29, 0.29].map((part, k) => {
      const from = top + heads[k].more, to = from + part * rest;
      top = to + gap;
      return [to, from];
    });
    const x = draw.scale(0, Math.max(100, n * 1.04), left, right);

    const least = field ? 2.5 * Math.sqrt(field.V) : 1, ends = path.tokens.reduce(([low, high], u) => [Math.min(low, u), Math.max(high, u)], [-least, least]);
    const y = draw.scale(1.06 * ends[0], 1.06 * ends[1], ...bands[0]);
    draw.axes(pen, x, y);
    draw.clip(pen, x, y, () => {
      const centre = thinned(path.centre, width);
      if (field && n) {
        const half = 2 * Math.sqrt(field.V);
        pen.beginPath();
        for (const [i, m] of centre) pen.lineTo(x(i), y(m + half));
        for (const [i, m] of [...centre].reverse()) pen.lineTo(x(i), y(m - half));
        [pen.fillStyle, pen.globalAlpha] = [ink.green, 0.16];
        pen.fill();
        pen.globalAlpha = 1;
      }
      draw.curve(pen, thinned(path.tokens, width).map(([i, u]) => [x(i), y(u)]), ink.blue, n > 400 ? 0.8 : 1.3);
      draw.curve(pen, centre.map(([i, u]) => [x(i), y(u)]), ink.orange, 2.5);
    });
    heads[0].paint(left, y.to);

    // The spread, on a logarithmic scale once it grows.
    const floor = 0.05, z = log ? draw.scale(Math.log10(floor), Math.log10(high), ...bands[1]) : draw.scale(0, high, ...bands[1]);
    const level_ = value => z(log ? Math.log10(Math.max(floor, value)) : value);
    draw.axes(pen, x, z, { yMost: 3 });
    draw.clip(pen, x, z, () => {
      draw.curve(pen, thinned(spread, width).map(([i, v]) => [x(i + 1), level_(v)]), ink.blue, 2.5);
      if (field) draw.curve(pen, [[x.from, level_(field.V)], [x.to, level_(field.V)]], ink.green, 2, [7, 5]);
    });
    heads[1].paint(left, z.to);

    // a sigma^2 against a V, with the maximum of the curve.
    const far = a > 0 ? 1 : -1, v = draw.scale(Math.min(0, far), Math.max(0, far), left, right);
    const w = a > 0 ? draw.scale(0, 0.3, ...bands[2]) : draw.scale(-2, 0, ...bands[2]);
    draw.axes(pen, v, w, { yMost: 3 });
    draw.clip(pen, v, w, () => {
      const samples = Array.from({ length: 101 }, (_, k) => (far * k) / 100);
      draw.curve(pen, samples.map(s => [v(s), w(s * (1 - s) ** 2)]), ink.ink, 2);
      draw.curve(pen, [[v.from, w(level)], [v.to, w(level)]], ink.orange, 2, [7, 5]);
      if (a > 0) draw.curve(pen, [[v(1 / 3), w(0)], [v(1 / 3), w(M.CRITICAL)]], ink.muted, 1, [2, 4]);
      if (n > 1) draw.curve(pen, [[v(a * path.spread[n - 1]), w.from], [v(a * path.spread[n - 1]), w.to]], ink.blue, 2);
      if (field) draw.diamond(pen, v(a * field.V), w(level), 7, ink.green);
    });
    heads[2].paint(left, w.to);
  }

  const tail = list => (list.length > 20 ? list.slice(10) : list);

  function tick() {
    if (!playing || page.state.view !== "sequence") return stop();
    const at = state();
    if (path.left || at.n >= states.LIMIT.sequence.n) return stop();
    // No faster than the computation.
    if (path.length >= at.n) at.n = Math.min(states.LIMIT.sequence.n, at.n + at.speed);
    page.changed();
    requestAnimationFrame(tick);
  }

  function stop() {
    if (!playing) return;
    playing = false;
    state().n = path.length;
    show();
    page.commit();
  }

  function start() {
    if (path && (path.left || path.length >= states.LIMIT.sequence.n)) state().n = 0;
    if (state().n === 0) path = null;
    playing = true;
    show();
    page.changed();
    requestAnimationFrame(() => requestAnimationFrame(tick));
  }

  function show() {
    play.textContent = playing ? "Pause" : "Play";
    play.setAttribute("aria-pressed", String(playing));
  }

  const fresh = set => value => {
    set(value);
    state().n = Math.min(state().n, 400);
  };
  const sync = [
    controls.slider("sequence-a", () => state().a, fresh(value => (state().a = value)), page.changed, page.commit),
    controls.slider("sequence-sigma", () => state().sigma, fresh(value => (state().sigma = value)), page.changed, page.commit),
    controls.slider("sequence-speed", () => state().speed, value => (state().speed = value), page.changed, page.commit),
  ];
  play.addEventListener("click", () => (playing ? stop() : start()));
  const act = (id, change) => controls.find(id).addEventListener("click", () => {
    stop();
    change(state());
    page.changed();
    page.commit();
  });
  act("sequence-step", at => (at.n = Math.min(states.LIMIT.sequence.n, path.length + 1)));
  act("sequence-restart", at => (at.n = 0));
  act("sequence-seed", at => Object.assign(at, { seed: (at.seed + 1) % 1000000, n: 0 }));

  return {
    render() {
      const found = compute();
      sync.forEach(update => update());
      controls.find("sequence-seed-shown").textContent = String(state().seed);
      const news = numbers(found);
      paint(found);
      return playing ? null : news;
    },
    start,
    stop,
    path: () => (path ? { tokens: [...path.tokens], noise: [...path.noise], several: path.several, left: path.left } : { tokens: [], noise: [] }),
  };
};
