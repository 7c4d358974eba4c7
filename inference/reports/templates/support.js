"use strict";
const element = id => document.getElementById(id);
const data = JSON.parse(element("data").textContent);
const count = data.labels.length, depth = data.layers.length;
const bytes = packed => Uint8Array.from(atob(packed), c => c.charCodeAt(0));
const floats = packed => new Float32Array(bytes(packed).buffer);
const every = (table, open) => Object.fromEntries(Object.entries(table).map(([map, kinds]) =>
  [map, Object.fromEntries(Object.entries(kinds).map(([kind, packed]) => [kind, open(packed)]))]));
const margins = every(data.margins, floats), beyond = every(data.beyond, bytes);
const sink = floats(data.sink), rms = floats(data.rms);
const spans = Array.from(document.querySelectorAll(".text span"));
const rows = Array.from(element("rows").rows), strips = rows.map(row => row.cells[1]);
const dark = matchMedia("(prefers-color-scheme: dark)");
let printing = false;

// One scale for all texts: what attention leaves alone has no colour, orange leads to the boundary, blue away from it.
const schemes = {
  light: {neutral: [242, 242, 239], toward: [[252, 205, 135], [236, 126, 30], [150, 50, 0]], away: [[178, 210, 232], [86, 150, 205], [20, 80, 160]], beyond: [0, 0, 0]},
  dark: {neutral: [38, 43, 50], toward: [[104, 66, 24], [196, 108, 22], [255, 176, 74]], away: [[36, 72, 104], [58, 122, 175], [150, 203, 245]], beyond: [255, 255, 255]},
};
const scheme = () => schemes[dark.matches && !printing ? "dark" : "light"];

function colour(value, kind, isBeyond) {
  const {neutral, toward, away} = data.kinds[kind], colours = scheme();
  if (isBeyond) return colours.beyond;
  const part = value < neutral ? (neutral - value) / (neutral - toward) : (value - neutral) / (away - neutral);
  const stops = [colours.neutral, ...(value < neutral ? colours.toward : colours.away)];
  const place = Math.min(1, Math.max(0, part)) * (stops.length - 1), k = Math.min(Math.floor(place), stops.length - 2);
  return stops[k].map((c, j) => Math.round(c + (place - k) * (stops[k + 1][j] - c)));
}

function ink(rgb) {
  const [r, g, b] = rgb.map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

const stripes = colours => colours.length === 1 ? `rgb(${colours[0]})` : `linear-gradient(to right, ${colours.map((rgb, k) =>
  `rgb(${rgb}) ${(100 * k / colours.length).toFixed(3)}% ${(100 * (k + 1) / colours.length).toFixed(3)}%`)})`;
function number(x) {
  if (!Number.isFinite(x)) return x > 0 ? "∞" : "\u2212∞";
  const size = Math.abs(x);
  return (x !== 0 && size < 1e-3 ? x.toExponential(2) : size < 10 ? x.toFixed(4) : x.toFixed(2)).replace("-", "\u2212");
}
const nats = x => x === null ? "" : x.toFixed(1);
const label = i => data.labels[i].trim() ? data.labels[i] : data.labels[i] === "" ? "no text" : "blank";
const chosen = () => [element("map").value, element("kind").value];
const unitOf = new Int32Array(count);
data.units.forEach(([first, last], unit) => unitOf.fill(unit, first, last));

let nearest = new Int32Array(count), current = {token: 0, layer: 0}, rank = new Map();

// The layer in which each token is nearest to the boundary.
function choose(map, kind) {
  const table = margins[map][kind];
  for (let i = 0; i < count; i++) {
    let best = Infinity;
    nearest[i] = 0;
    for (let l = 0; l < depth; l++) {
      const value = table[l * count + i], distance = kind === "logabsdet" ? value : Math.abs(value);
      if (distance < best) { best = distance; nearest[i] = l; }
    }
  }
}

const layerOf = i => element("layer").value === "nearest" ? nearest[i] : Number(element("layer").value);

function paint() {
  const [map, kind] = chosen(), table = margins[map][kind], over = beyond[map][kind], words = data.kinds[kind];
  choose(map, kind);
  rank = new Map(data.nearest[map][kind].map((i, k) => [i, k + 1]));
  const at = (l, i) => colour(table[l * count + i], kind, over[l * count + i]);
  for (let i = 0; i < count; i++) {
    strips[i].firstChild.style.background = stripes(Array.from({length: depth}, (_, l) => at(l, i)));
    const where = nearest[i], value = table[where * count + i], small = document.createElement("small");
    small.textContent = ` layer ${data.layers[where]}`;
    rows[i].cells[2].replaceChildren(number(value), small);
    rows[i].classList.toggle("support", rank.has(i));
    strips[i].setAttribute("aria-label", `${words.title} in ${depth} layers; nearest ${number(value)} in layer ${data.layers[where]}`);
  }
  for (const span of spans) {
    const [first, last] = data.units[span.dataset.unit];
    const colours = Array.from({length: last - first}, (_, k) => at(layerOf(first + k), first + k));
    span.style.background = stripes(colours);
    span.style.color = ink(colours[0]);
    span.classList.toggle("support", colours.some((_, k) => rank.has(first + k)));
  }
  for (const list of document.querySelectorAll(".nearest")) list.hidden = list.dataset.list !== `${map}-${kind}`;
  const ends = Array.from({length: 25}, (_, k) => k < 12 ? words.toward + (words.neutral - words.toward) * k / 12 : words.neutral + (words.away - words.neutral) * (k - 12) / 12);
  element("bar").style.background = `linear-gradient(to right, ${ends.map(value => `rgb(${colour(value, kind, false)})`)})`;
  element("beyond-legend").style.display = words.beyond ? "" : "none";
  document.querySelector(".beyond").style.background = `rgb(${scheme().beyond})`;
  ["toward", "neutral", "away"].forEach((id, k) => { element(id).textContent = words.ticks[k]; });
  element("meaning").textContent = words.meaning;
  element("which").textContent = data.maps[map].meaning;
  const layer = element("layer").value;
  element("seen").textContent = layer === "nearest" ? "the layer where it is nearest to the boundary" : `layer ${data.layers[layer]}`;
  const outside = over.reduce((sum, one) => sum + one, 0);
  element("count").textContent = words.beyond ? `${outside} of ${over.length} blocks ${words.beyond}.` : "";
}

function tell(i, l) {
  const [map, kind] = chosen(), place = l * count + i;
  const token = document.createElement("b");
  token.textContent = label(i);
  const window = data.windows.findIndex(([first, last]) => first <= i && i < last);
  const inside = data.windows.length > 1 ? ` (${i - data.windows[window][0]} in window ${window + 1})` : "";
  const parts = [
    ` · token ${i}${inside}`, `layer ${data.layers[l]}`,
    `${data.kinds[kind].title} ${number(margins[map][kind][place])}${beyond[map][kind][place] ? ", beyond the boundary" : ""}`,
    ...(rank.has(i) ? [`support token ${rank.get(i)}`] : []),
    `attention to the first token ${Math.round(100 * sink[place])} %`, `stream rms ${rms[place].toPrecision(3)}`,
    ...(data.surprisal[i] === null ? [] : [`surprisal ${data.surprisal[i].toFixed(2)}`]),
    `entropy ${data.entropy[i].toFixed(2)}`,
  ];
  element("status").replaceChildren(token, parts.join(" · "));
}

const cursor = document.createElement("i");
cursor.setAttribute("aria-hidden", "true");
function mark(i, l) {
  cursor.style.left = `${100 * l / depth}%`;
  cursor.style.width = `${100 / depth}%`;
  strips[i].firstChild.replaceChildren(cursor);
  tell(i, l);
}
function go(i, l) {
  strips[current.token].tabIndex = -1;
  current = {token: i, layer: l};
  strips[i].tabIndex = 0;
  strips[i].focus({preventScroll: true});
  strips[i].scrollIntoView({block: "nearest"});
  mark(i, l);
}

rows.forEach((row, i) => {
  for (const [cell, value] of [[row.cells[3], data.surprisal[i]], [row.cells[4], data.entropy[i]]]) {
    cell.textContent = nats(value);
    cell.style.setProperty("--part", value === null ? 0 : Math.min(1, value / 12));
  }
  const strip = strips[i];
  strip.tabIndex = i ? -1 : 0;
  const layerAt = event => {
    const box = strip.getBoundingClientRect();
    return Math.min(depth - 1, Math.max(0, Math.floor(depth * (event.clientX - box.left) / box.width)));
  };
  strip.addEventListener("mousemove", event => mark(i, layerAt(event)));
  strip.addEventListener("click", event => go(i, layerAt(event)));
  strip.addEventListener("focus", () => mark(i, current.token === i ? current.layer : nearest[i]));
});
element("rows").addEventListener("keydown", event => {
  const {token, layer} = current;
  const next = {
    ArrowDown: [token + 1, layer], ArrowUp: [token - 1, layer], ArrowRight: [token, layer + 1], ArrowLeft: [token, layer - 1],
    Home: [token, 0], End: [token, depth - 1], PageDown: [token + 20, layer], PageUp: [token - 20, layer],
  }[event.key];
  if (next === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  go(Math.min(count - 1, Math.max(0, next[0])), Math.min(depth - 1, Math.max(0, next[1])));
});

let shown = 0;
function read(unit) {
  const [first, last] = data.units[unit];
  let i = first;
  for (let k = first; k < last; k++) if (rank.has(k)) { i = k; break; }
  tell(i, layerOf(i));
}
function step(unit) {
  spans[shown].tabIndex = -1;
  shown = unit;
  spans[unit].tabIndex = 0;
  spans[unit].focus();
}
spans.forEach((span, unit) => { span.tabIndex = unit ? -1 : 0; });
for (const text of document.querySelectorAll(".text")) {
  const at = event => event.target.dataset.unit === undefined ? -1 : Number(event.target.dataset.unit);
  const turned = getComputedStyle(text).direction === "rtl";
  text.addEventListener("mouseover", event => { if (at(event) >= 0) read(at(event)); });
  text.addEventListener("click", event => { if (at(event) >= 0) step(at(event)); });
  text.addEventListener("focusin", event => { if (at(event) >= 0) read(at(event)); });
  text.addEventListener("keydown", event => {
    const right = turned ? -1 : 1;
    const next = {ArrowRight: shown + right, ArrowLeft: shown - right, Home: 0, End: spans.length - 1}[event.key];
    if (next === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    step(Math.min(spans.length - 1, Math.max(0, next)));
  });
}
for (const button of document.querySelectorAll(".nearest button")) {
  button.addEventListener("click", () => go(Number(button.dataset.token), data.layers.indexOf(Number(button.dataset.layer))));
}
const tick = [1, 2, 5, 10, 20, 50].find(step => depth / step <= 6) ?? 100;
element("axis").append(...data.layers.map((layer, l) => [layer, l]).filter(([, l]) => l % tick === 0).map(([layer, l]) => {
  const span = document.createElement("span");
  span.textContent = layer;
  span.style.left = `${100 * (l + 0.5) / depth}%`;
  return span;
}));
for (const id of ["kind", "map", "layer"]) element(id).addEventListener("input", paint);
document.querySelector("form").addEventListener("submit", event => event.preventDefault());
dark.addEventListener("change", paint);
addEventListener("beforeprint", () => { printing = true; paint(); });
addEventListener("afterprint", () => { printing = false; paint(); });
paint();
