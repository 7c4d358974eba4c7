// Canvases that follow their size on the page, scales with round ticks, and colour maps for every kind of colour vision:
// orange to blue for signed margins, dark to light for distances.
const draw = (() => {
  const ink = {};

  /** Colours and the font of the page, read again when the theme or the size of the text changes. */
  function readTheme() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["paper", "soft", "rule", "ink", "muted", "blue", "orange", "green", "pink"]) ink[name] = style.getPropertyValue(`--${name}`).trim();
    ink.size = parseFloat(style.fontSize);
    ink.dark = style.getPropertyValue("color-scheme").trim() === "dark";
  }

  /** A canvas ready to draw on in CSS pixels. */
  function surface(canvas) {
    const ratio = Math.min(3, window.devicePixelRatio || 1), width = canvas.clientWidth, height = canvas.clientHeight;
    const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.lineJoin = pen.lineCap = "round";
    return { pen, width, height };
  }

  /** Linear map of [low, high] onto pixels [from, to]. */
  function scale(low, high, from, to) {
    const map = x => from + ((x - low) / (high - low)) * (to - from);
    map.invert = pixel => low + ((pixel - from) / (to - from)) * (high - low);
    Object.assign(map, { low, high, from, to });
    return map;
  }

  function ticks(low, high, most) {
    const raw = (high - low) / Math.max(1, most), power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map(k => k * power).find(k => k >= raw);
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(Math.abs(k) < 1e-12 ? 0 : k * step);
    return { found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
  }

  const tickText = (x, digits) => (Math.abs(x) >= 1e4 ? x.toExponential(0) : x.toFixed(digits)).replace("-", "−");

  function font(pen, factor = 0.8, style = "") {
    pen.font = `${style} ${(ink.size * factor).toFixed(1)}px system-ui, sans-serif`;
  }

  function text(pen, words, x, y, { colour = ink.muted, align = "left", base = "alphabetic", factor = 0.8, halo = false, style = "", most } = {}) {
    font(pen, factor, style);
    [pen.textAlign, pen.textBaseline] = [align, base];
    if (halo) {
      [pen.strokeStyle, pen.lineWidth] = [ink.paper, 4];
      pen.strokeText(words, x, y);
    }
    pen.fillStyle = colour;
    pen.fillText(words, x, y, most);
  }

  /** Grid lines with numbers, below (x) or to the left (y). */
  function axes(pen, x, y, { xNumbers = true, yNumbers = true, xMost = 8, yMost = 5 } = {}) {
    const unit = ink.size * 0.8;
    pen.lineWidth = 1;
    if (x) {
      const { found, digits } = ticks(x.low, x.high, Math.min(xMost, (x.to - x.from) / (unit * 3)));
      for (const at of found) {
        pen.strokeStyle = at === 0 ? ink.muted : ink.rule;
        stroke(pen, [[x(at), y.from], [x(at), y.to]]);
        if (xNumbers) text(pen, tickText(at, digits), x(at), y.from + 5, { align: "center", base: "top" });
      }
    }
    const { found, digits } = ticks(y.low, y.high, Math.min(yMost, (y.from - y.to) / (unit * 2)));
    for (const at of found) {
      pen.strokeStyle = at === 0 ? ink.muted : ink.rule;
      stroke(pen, [[x.from, y(at)], [x.to, y(at)]]);
      if (yNumbers) text(pen, tickText(at, digits), x.from - 6, y(at), { align: "right", base: "middle" });
    }
  }

  function stroke(pen, points) {
    pen.beginPath();
    points.forEach(([x, y], k) => (k ? pen.lineTo(x, y) : pen.moveTo(x, y)));
    pen.stroke();
  }

  /** A curve through samples, in one colour. */
  function curve(pen, points, colour, width = 2, dash = []) {
    [pen.strokeStyle, pen.lineWidth] = [colour, width];
    pen.setLineDash(dash);
    stroke(pen, points);
    pen.setLineDash([]);
  }

  function clip(pen, x, y, paint) {
    pen.save();
    pen.beginPath();
    pen.rect(x.from, y.to, x.to - x.from, y.from - y.to);
    pen.clip();
    paint();
    pen.restore();
  }

  function diamond(pen, x, y, size, colour) {
    pen.beginPath();
    pen.moveTo(x, y - size);
    pen.lineTo(x + size, y);
    pen.lineTo(x, y + size);
    pen.lineTo(x - size, y);
    pen.closePath();
    [pen.fillStyle, pen.strokeStyle, pen.lineWidth] = [ink.paper, colour, 2.5];
    pen.fill();
    pen.stroke();
  }

  /** A title and its legend, on one line if both fit, otherwise on lines below: `more` is their height beyond one line, `paint` draws them above a plot. */
  function heading(pen, wide, title, legend = []) {
    const gap = ink.size * 0.7, tall = ink.size * 1.15, mark = ink.size * 1.1;
    font(pen, 0.8, "600");
    const taken = pen.measureText(title).width + gap;
    font(pen);
    const entries = legend.map(([colour, words]) => ({ colour, words, wide: pen.measureText(words).width + mark + gap }));
    const all = entries.reduce((sum, entry) => sum + entry.wide, -gap), beside = taken + all <= wide;
    const lines = [[]];
    let at = beside ? wide - all : 0;
    for (const entry of entries) {
      if (!beside && (lines.length === 1 || at + entry.wide - gap > wide)) {
        lines.push([]);
        at = 0;
      }
      lines.at(-1).push({ ...entry, at });
      at += entry.wide;
    }
    const more = (lines.length - 1) * tall;
    return {
      more,
      paint(left, top) {
        lines.forEach((line, k) => {
          const base = top - ink.size * 0.4 - more + k * tall;
          if (k === 0) text(pen, title, left, base, { colour: ink.ink, style: "600", most: wide });
          for (const entry of line) {
            pen.fillStyle = entry.colour;
            pen.fillRect(left + entry.at, base - ink.size * 0.5, ink.size * 0.7, ink.size * 0.4);
            text(pen, entry.words, left + entry.at + mark, base);
          }
        });
      },
    };
  }

  const rgb = hex => [1, 3, 5].map(k => parseInt(hex.slice(k, k + 2), 16));
  const SIGNED = {
    light: ["#7a2e00", "#c2590e", "#ee9a55", "#fbe3cd", "#f7f7f7", "#cfe3f1", "#86b9dc", "#3c83bb", "#0f4c81"].map(rgb),
    dark: ["#ffc79d", "#f29450", "#c4651f", "#7d3c10", "#1d2024", "#183b58", "#23618f", "#4594cc", "#9bcdf2"].map(rgb),
  };
  const DISTANCE = {
    light: ["#1d2b53", "#2f4a86", "#4f72a8", "#7f9dc4", "#b2c6de", "#dfe8f2", "#f8fafc"].map(rgb),
    dark: ["#ffe9a8", "#e6b45c", "#b07d3a", "#775733", "#4b3f35", "#2e2e33", "#202429"].map(rgb),
  };

  /** 256 colours for values from low to high. */
  function palette(kind) {
    const stops = (kind === "singular_value" ? DISTANCE : SIGNED)[ink.dark ? "dark" : "light"];
    const table = new Uint32Array(256);
    for (let k = 0; k < 256; k++) {
      const place = (k / 255) * (stops.length - 1), i = Math.min(Math.floor(place), stops.length - 2), rest = place - i;
      const [r, g, b] = stops[i].map((c, j) => Math.round(c + rest * (stops[i + 1][j] - c)));
      table[k] = (255 << 24) | (b << 16) | (g << 8) | r; // little endian, like every machine with a browser
    }
    return table;
  }

  return { ink, readTheme, surface, scale, axes, text, stroke, curve, clip, diamond, heading, palette, ticks, tickText };
})();
