// The view of a real sentence: margins of every token in every layer of a language model, computed by the library and
// stored beside this file; nothing is computed here but colours.
const sentenceView = page => {
  const { ink } = draw, D = sentenceData, T = D.tokens.length, L = D.layers;
  const canvas = controls.find("sentence-canvas"), bar = controls.find("sentence-bar");
  // Where attention does nothing (no colour), the boundary, and the other end of the scale, the same for every sentence.
  const SCALES = {
    sigma_min: { neutral: 1, toward: 0, away: 2, ticks: ["0, boundary", "1, no attention", "≥ 2"] },
    logabsdet: { neutral: 0, toward: -60, away: 60, ticks: ["≤ −60, nearer", "0, no attention", "≥ 60"] },
    spectral: { neutral: 1, toward: 0, away: 2, ticks: ["0, boundary", "1, no attention", "≥ 2"] },
    complex: { neutral: 1, toward: 0, away: 2, ticks: ["0, boundary", "1, no attention", "≥ 2"] },
  };
  let cells = null;

  const state = () => page.state.sentence;
  /** The stored number; null stands for infinity, where no eigenvalue is real. */
  const margin = (kind, layer, token, map = state().map) => D.margins[map][kind][layer][token] ?? Infinity;
  const isBeyond = (layer, token) => {
    const { kind, map } = state();
    if (kind === "sigma_min") return false;
    return kind === "logabsdet" ? D.sign[map][layer][token] < 0 : margin(kind, layer, token) < 0;
  };
  const visible = text => (text.trim() === "" ? "␣" : text);

  /** The token nearest to the boundary, without the first one, which sees itself alone. */
  function nearest() {
    const { kind } = state();
    let best = { layer: 0, token: 1, distance: Infinity };
    for (let layer = 0; layer < L; layer++) {
      for (let token = 1; token < T; token++) {
        const value = margin(kind, layer, token), distance = kind === "logabsdet" ? value : Math.abs(value);
        if (distance < best.distance) best = { layer, token, distance };
      }
    }
    return best;
  }

  function numbers() {
    const { token, layer, map, kind } = state(), best = nearest();
    let beyond = 0;
    for (let l = 0; l < L; l++) for (let t = 0; t < T; t++) beyond += isBeyond(l, t);
    controls.show("sentence.text", visible(D.tokens[token]));
    for (const one of ["sigma_min", "logabsdet", "spectral", "complex"]) controls.show(`sentence.${one}`, margin(one, layer, token));
    controls.show("sentence.sign", D.sign[map][layer][token]);
    controls.show("sentence.sink", D.sink[layer][token]);
    controls.show("sentence.surprisal", D.surprisal[token], "–");
    controls.show("sentence.entropy", D.entropy[token]);
    controls.show("sentence.nearest", visible(D.tokens[best.token]));
    controls.show("sentence.nearestLayer", best.layer);
    controls.show("sentence.nearestMargin", margin(kind, best.layer, best.token));
    controls.show("sentence.beyond", beyond);
    const words = `“${visible(D.tokens[token]).trim()}” in layer ${layer}: the smallest singular value of its block is ${controls.format(margin("sigma_min", layer, token))}.`;
    controls.show("sentence.verdict", words);
    return words;
  }

  function colour(value, kind, table) {
    const { neutral, toward, away } = SCALES[kind];
    const part = value < neutral ? 0.5 * (1 - Math.min(1, (neutral - value) / (neutral - toward))) : 0.5 + 0.5 * Math.min(1, (value - neutral) / (away - neutral));
    const shade = table[Math.min(255, Math.floor(256 * part))];
    return `rgb(${shade & 255}, ${(shade >> 8) & 255}, ${(shade >> 16) & 255})`;
  }

  function paint() {
    const { pen, width, height } = draw.surface(canvas), { kind, token, layer } = state(), table = draw.palette("determinant"), size = ink.size;
    const labels = D.tokens.map(text => visible(text).trim());
    draw.text(pen, "", 0, 0);
    const widest = Math.max(...labels.map(words => pen.measureText(words).width));
    const left = Math.min(widest + size * 0.6, width * 0.3), top = size * 0.4, bottom = height - size * 1.9;
    const x = draw.scale(0, L, left, width - 2), y = draw.scale(0, T, top, bottom);
    cells = { x, y };
    for (let t = 0; t < T; t++) {
      draw.text(pen, labels[t], left - size * 0.35, y(t + 0.5), { colour: t === token ? ink.ink : ink.muted, align: "right", base: "middle", style: t === token ? "700" : "", most: left - size * 0.5 });
      for (let l = 0; l < L; l++) {
        pen.fillStyle = isBeyond(l, t) ? ink.ink : colour(margin(kind, l, t), kind, table);
        pen.fillRect(x(l), y(t), Math.ceil(x(l + 1) - x(l)), Math.ceil(y(t + 1) - y(t)) - 1);
      }
    }
    const { found } = draw.ticks(0, L - 1, Math.min(10, (width - left) / (3 * size)));
    for (const l of found) draw.text(pen, String(l), x(l + 0.5), bottom + 4, { align: "center", base: "top" });
    draw.text(pen, "layer", left - size * 0.35, bottom + 4, { align: "right", base: "top" });
    for (const [shade, wide] of [[ink.paper, 6], [ink.ink, 3]]) {
      [pen.strokeStyle, pen.lineWidth] = [shade, wide];
      pen.strokeRect(x(layer), y(token), x(layer + 1) - x(layer), y(token + 1) - y(token) - 1);
    }
    paintBar(kind, table);
  }

  function paintBar(kind, table) {
    const { pen, width, height } = draw.surface(bar), tall = height - ink.size * 1.2, { toward, away, ticks } = SCALES[kind];
    for (let k = 0; k < width; k++) {
      pen.fillStyle = colour(toward + ((away - toward) * (k + 0.5)) / width, kind, table);
      pen.fillRect(k, 0, 1.5, tall);
    }
    ticks.forEach((words, k) => draw.text(pen, words, [1, width / 2, width - 1][k], height - 1, { align: ["left", "center", "right"][k], factor: 0.75 }));
  }

  const field = name => controls.slider(`sentence-${name}`, () => state()[name], value => (state()[name] = value), page.changed, page.commit);
  controls.find("sentence-token").max = String(T - 1);
  controls.find("sentence-layer").max = String(L - 1);
  const sync = [field("token"), field("layer")];
  for (const name of ["kind", "map"]) {
    controls.find(`sentence-${name}`).addEventListener("change", event => {
      state()[name] = event.target.value;
      page.changed();
      page.commit();
    });
  }
  canvas.addEventListener("click", event => {
    if (cells === null) return;
    state().token = states.clamp(Math.floor(cells.y.invert(event.offsetY)), 0, T - 1);
    state().layer = states.clamp(Math.floor(cells.x.invert(event.offsetX)), 0, L - 1);
    page.changed();
    page.commit();
  });
  const { model, environment } = D, day = environment.date.slice(0, 10);
  controls.find("sentence-source").textContent = `“${D.text}” ${model.name}; weights ${model.weights_sha256}. Measured by ${environment.command} on ${day}, in ${environment.dtype} on ${environment.processor}.`;

  return {
    render() {
      sync.forEach(update => update());
      for (const name of ["kind", "map"]) {
        const choice = controls.find(`sentence-${name}`);
        if (choice.value !== state()[name]) choice.value = state()[name];
      }
      const news = numbers();
      paint();
      return news;
    },
  };
};
