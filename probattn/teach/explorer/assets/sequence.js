// The view of the infinite sequence: the curve V (1 - a V)^2, whose maximum 4/27 is the end of stationarity, a path
// computed on demand, and its spread; with a radius, the past is seen on a ball and nothing ends.
const sequenceView = page => {
  const M = sequenceMathematics, { ink } = draw, canvas = controls.find("sequence-canvas"), play = controls.find("sequence-play");
  const run = { key: "", of: "", square: null, bounded: [] };
  let path = null, playing = false;
  const state = () => page.state.sequence;
  const gone = "none";

  /** The long run of a bounded past, and its curve; only once the sliders rest, because it takes some milliseconds. */
  function longRun(settled) {
    const { a, sigma, radius } = state(), key = JSON.stringify([a, sigma, radius]), of = JSON.stringify([a, radius]);
    if (radius === 0) return { square: null, bounded: [] };
    if (settled && run.key !== key) Object.assign(run, { key, square: boundedMathematics.meanSquare(a, sigma, radius) });
    if (settled && run.of !== of) Object.assign(run, { of, bounded: a > 0 ? boundedMathematics.curve(a, radius, 0.3) : [] });
    return { square: run.key === key ? run.square : null, bounded: run.of === of ? run.bounded : [] };
  }

  function compute(settled) {
    const { a, sigma, seed, n, radius } = state();
    if (!path || path.a !== a || path.sigma !== sigma || path.seed !== seed || path.radius !== radius || path.length > n) path = new M.Path(a, sigma, seed, radius);
    // Long paths are computed in parts, so that the page stays responsive.
    const until = performance.now() + 12;
    while (path.length < n && !path.left && performance.now() < until) path.step();
    if (path.length < n && !path.left) requestAnimationFrame(() => page.changed());
    // The mean-field equation is for a Gaussian past, which a ball makes another of.
    return { field: radius > 0 ? null : M.meanField(a, sigma), level: a * sigma * sigma, ...longRun(settled || playing) };
  }

  function numbers({ field, level, square }) {
    const n = path.length, last = list => (n ? list[n - 1] : null), { a, radius } = state();
    controls.show("sequence.level", level);
    controls.show("sequence.n", n);
    controls.show("sequence.last", last(path.tokens), "–");
    controls.show("sequence.mean", last(path.centre), "–");
    controls.show("sequence.spread", last(path.spread), "–");
    controls.show("sequence.sampled", n ? 1 - a * last(path.spread) : null, "–");
    controls.show("sequence.several", path.several);
    controls.show("sequence.V", field && field.V, radius > 0 ? "not for a ball" : "none: a σ² > 4/27");
    controls.show("sequence.margin", field && field.margin, gone);
    controls.show("sequence.drift", field && field.drift, gone);
    controls.show("sequence.kappa", radius > 0 ? Math.abs(a) * radius * radius : null, "–");
    controls.show("sequence.floor", radius > 0 ? 1 - Math.abs(a) * radius * radius : null, "–");
    controls.show("sequence.bounded", square, radius > 0 ? "not found" : "–");
    const place = controls.find("sequence-place"), top = 0.4;
    place.style.left = `${100 * states.clamp(level / top, 0, 1)}%`;
    const below = level <= M.CRITICAL || radius > 0;
    let words = "Above 4/27 there is no stationary spread.";
    if (path.left) words = `The path has escaped: |u| > 10 000 at token ${n}. Play restarts it.`;
    else if (n >= states.LIMIT.sequence.n) words = `This page stops a path after ${n} tokens. Play restarts it.`;
    else if (radius > 0) words = Math.abs(a) * radius * radius < 1 ? "Bounded memory with a ρ² below one: every past has one next token for every noise, and the spread stays." : "Bounded memory: the path cannot escape, but with a ρ² of one or more some past may fold.";
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

  /** The three plots: beside each other where there is room, the curve always first. */
  function layout(pen, width, height, heads) {
    const size = ink.size, left = size * 3.4, gap = size * 3.2, right = width - size * 0.8, two = width > 32 * size;
    const middle = two ? left + (right - left) * 0.42 : right, second = two ? middle + size * 4.2 : left;
    const titled = heads.map(([title, legend], k) => draw.heading(pen, k === 0 ? middle - left : right - second, title, legend));
    const bands = [];
    let top = size * 1.6;
    const rest = height - size * 2.4 - (two ? gap : 2 * gap) - titled.slice(two ? 1 : 0).reduce((sum, head) => sum + head.more, 0) - size * 1.2;
    titled.forEach((head, k) => {
      if (two && k === 0) return bands.push([height - size * 3.4, top + head.more]);
      const from = top + head.more, to = from + rest * (two ? 0.5 : [0.36, 0.34, 0.3][k]);
      top = to + gap;
      bands.push([to, from]);
    });
    return { titled, bands, across: [[left, middle], [second, right], [second, right]] };
  }

  function paint({ field, level, bounded, square }) {
    const { pen, width, height } = draw.surface(canvas), { a, radius } = state(), n = path.length;
    const spread = path.spread.slice(1), known = field ? field.V : square;
    const high = Math.max(known ? 2 * known : 1, 1.1 * Math.max(0, ...tail(spread))), log = high > 30;
    const { titled, bands, across } = layout(pen, width, height, [
      ["aV (1 − aV)² against aV", [[ink.orange, "a σ²"], [ink.blue, "aV of the sample"], ...(radius > 0 ? [[ink.green, "bounded memory"]] : [])]],
      ["path u\u2099", [[ink.orange, "mean so far"], ...(field ? [[ink.green, "mean ± 2√V"]] : [])]],
      [log ? "log₁₀ of the sample variance" : "sample variance so far", field ? [[ink.green, "mean field V"]] : square ? [[ink.green, "mean square in the long run"]] : []],
    ]);
    paintCurve(pen, { field, level, bounded, square, known }, across[0], bands[0]);
    titled[0].paint(across[0][0], bands[0][1]);
    const x = draw.scale(0, Math.max(100, n * 1.04), ...across[1]);

    const least = known ? 2.5 * Math.sqrt(known) : 1, ends = path.tokens.reduce(([low, high], u) => [Math.min(low, u), Math.max(high, u)], [-least, least]);
    const y = draw.scale(1.06 * ends[0], 1.06 * ends[1], ...bands[1]);
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
    titled[1].paint(across[1][0], y.to);

    // The spread, on a logarithmic scale once it grows.
    const floor = 0.05, z = log ? draw.scale(Math.log10(floor), Math.log10(high), ...bands[2]) : draw.scale(0, high, ...bands[2]);
    const level_ = value => z(log ? Math.log10(Math.max(floor, value)) : value);
    draw.axes(pen, x, z, { yMost: 3 });
    draw.clip(pen, x, z, () => {
      draw.curve(pen, thinned(spread, width).map(([i, v]) => [x(i + 1), level_(v)]), ink.blue, 2.5);
      if (known) draw.curve(pen, [[x.from, level_(known)], [x.to, level_(known)]], ink.green, 2, [7, 5]);
    });
    titled[2].paint(across[2][0], z.to);
  }

  /** The point of this view: a sigma^2 against a V, whose maximum 4/27 ends stationarity, unless the memory is bounded. */
  function paintCurve(pen, { field, level, bounded, square, known }, across, band) {
    const { a, radius } = state(), n = path.length, far = a > 0 ? 1 : -1, widest = Math.max(1, ...bounded.map(point => point[0]));
    const v = draw.scale(Math.min(0, far), a > 0 ? widest : Math.max(0, far), ...across);
    const w = a > 0 ? draw.scale(0, 0.3, ...band) : draw.scale(-2, 0, ...band);
    draw.axes(pen, v, w, { yMost: 6 });
    draw.clip(pen, v, w, () => {
      const samples = Array.from({ length: 101 }, (_, k) => (far * k) / 100);
      draw.curve(pen, samples.map(s => [v(s), w(s * (1 - s) ** 2)]), radius > 0 ? ink.muted : ink.ink, radius > 0 ? 1.5 : 3, radius > 0 ? [3, 4] : []);
      if (bounded.length) draw.curve(pen, [[v(0), w(0)], ...bounded.map(([s, t]) => [v(s), w(t)])], ink.green, 3);
      draw.curve(pen, [[v.from, w(level)], [v.to, w(level)]], ink.orange, 2, [7, 5]);
      if (a > 0) draw.curve(pen, [[v(1 / 3), w(0)], [v(1 / 3), w(M.CRITICAL)]], ink.muted, 1, [2, 4]);
      if (n > 1) draw.curve(pen, [[v(a * path.spread[n - 1]), w.from], [v(a * path.spread[n - 1]), w.to]], ink.blue, 2);
      if (known) draw.diamond(pen, v(a * known), w(level), 7, ink.green);
    });
    if (a > 0) draw.text(pen, "4/27 at aV = 1/3", v(1 / 3) + 4, w(M.CRITICAL) - 6, { colour: ink.ink, halo: true });
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
    controls.slider("sequence-radius", () => state().radius, fresh(value => (state().radius = value)), page.changed, page.commit),
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
    render(settled) {
      const found = compute(settled);
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
