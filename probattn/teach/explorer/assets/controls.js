// Parts of the page that every view uses: handles moved by pointer or keys, sliders, displayed numbers.
const controls = (() => {
  const find = id => document.getElementById(id);

  /** A number as displayed; the element carries it in full. */
  function format(x) {
    if (x === Infinity) return "∞";
    if (Math.abs(x) < 1e-12) return "0"; // rounding, not a number to read
    if (Number.isInteger(x) && Math.abs(x) < 1e5) return String(x).replace("-", "−");
    const size = Math.abs(x);
    const words = size >= 1e5 || size < 1e-4 ? x.toExponential(3) : size >= 1000 ? x.toFixed(1) : size >= 10 ? x.toFixed(3) : x.toFixed(4);
    return words.replace(/-/g, "−");
  }

  const cache = new Map();
  const spot = name => {
    if (!cache.has(name)) cache.set(name, document.querySelector(`[data-name="${name}"]`));
    return cache.get(name);
  };

  const inFull = x => (x === Infinity ? "inf" : String(x));

  /** Show a number, a list of numbers or points, or words; null means none. */
  function show(name, value, none = "none") {
    const element = spot(name), list = Array.isArray(value);
    const one = x => (typeof x === "number" ? format(x) : Array.isArray(x) ? `(${x.map(format).join(",\u00a0")})` : x);
    const text = value === null || (list && !value.length) ? none : list ? value.map(one).join(", ") : one(value);
    const full = value === null ? "" : list ? value.flat().map(inFull).join(" ") : typeof value === "number" ? inFull(value) : value;
    if (element.textContent !== text) element.textContent = text;
    if (element.dataset.value !== full) element.dataset.value = full;
  }

  /** The text of a displayed number. */
  const shown = name => spot(name).textContent;

  const round = x => Math.round(x * 1000) / 1000;

  /** Handles over a canvas, one per token; each can be dragged, moved by arrow keys, or removed. */
  class Handles {
    /** `place` returns the pixels of handle k, `move` takes pixels or a step in units, `remove` may do nothing. */
    constructor(layer, { label, place, move, remove, done, value, className }) {
      Object.assign(this, { layer, label, place, move, remove, done, value, className, items: [] });
    }

    make(k) {
      const handle = document.createElement("button");
      handle.type = "button";
      handle.setAttribute("role", "slider");
      handle.setAttribute("aria-valuemin", "-100");
      handle.setAttribute("aria-valuemax", "100");
      let offset = null;
      handle.addEventListener("pointerdown", event => {
        if (event.button !== 0) return;
        const box = this.layer.getBoundingClientRect(), [x, y] = this.place(k);
        offset = [event.clientX - box.left - x, event.clientY - box.top - y];
        handle.setPointerCapture(event.pointerId);
        handle.focus({ preventScroll: true });
        event.preventDefault();
      });
      handle.addEventListener("pointermove", event => {
        if (offset === null) return;
        const box = this.layer.getBoundingClientRect();
        this.move(k, { pixels: [event.clientX - box.left - offset[0], event.clientY - box.top - offset[1]] });
      });
      const release = () => {
        if (offset === null) return;
        offset = null;
        this.done();
      };
      handle.addEventListener("pointerup", release);
      handle.addEventListener("pointercancel", release);
      handle.addEventListener("lostpointercapture", release);
      handle.addEventListener("keydown", event => {
        const step = event.shiftKey ? 0.2 : event.altKey ? 0.001 : 0.02;
        const by = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] }[event.key];
        if (by) this.move(k, { step: by });
        else if ((event.key === "Delete" || event.key === "Backspace") && this.remove) this.remove(k);
        else return;
        event.preventDefault();
        this.done();
      });
      this.layer.append(handle);
      return handle;
    }

    update(count) {
      while (this.items.length < count) this.items.push(this.make(this.items.length));
      while (this.items.length > count) {
        const last = this.items.pop(), focused = last === document.activeElement;
        last.remove();
        if (focused && count) this.items[count - 1].focus();
      }
      this.items.forEach((handle, k) => {
        const [x, y] = this.place(k), text = this.label(k), value = this.value(k);
        handle.style.transform = `translate(${x.toFixed(2)}px, ${y.toFixed(2)}px)`;
        const name = `handle ${this.className(k)}`;
        if (handle.className !== name) handle.className = name;
        if (handle.getAttribute("aria-label") !== text) handle.setAttribute("aria-label", text);
        if (handle.getAttribute("aria-valuetext") !== value.text) {
          handle.setAttribute("aria-valuetext", value.text);
          handle.setAttribute("aria-valuenow", value.now);
        }
      });
    }
  }

  /** A slider bound to one field through `get` and `set`, with its number. */
  function slider(id, get, set, changed, done) {
    const input = find(id), output = find(`${id}-shown`);
    input.addEventListener("input", () => {
      set(Number(input.value));
      changed();
    });
    input.addEventListener("change", done);
    return () => {
      const value = get();
      if (Number(input.value) !== value) input.value = String(value);
      const text = String(Number(value.toFixed(4))).replace("-", "−");
      if (output.textContent !== text) output.textContent = text;
      output.dataset.value = String(value);
    };
  }

  /** Fill a table, reusing its rows; each row is a list of texts or numbers. */
  function table(body, rows) {
    while (body.rows.length > rows.length) body.deleteRow(-1);
    rows.forEach((row, i) => {
      const line = body.rows[i] || body.insertRow(-1);
      row.forEach((cell, j) => {
        const at = line.cells[j] || line.insertCell(-1), text = typeof cell === "number" ? format(cell) : cell;
        if (at.textContent !== text) at.textContent = text;
        if (typeof cell === "number") at.dataset.value = inFull(cell);
      });
    });
  }

  const NAMES = {
    certified: "certified: the density is exact",
    regular: "regular: no fold was seen",
    folded: "folded: some noise has several solutions",
  };

  /** Show the regime as a badge with its reason, which begins with a word and not with a symbol; return the announcement. */
  function showRegime(view, { name, proved, reason }) {
    const badge = spot(`${view}.regime`);
    show(`${view}.regime`, name);
    badge.className = `badge ${name}`;
    show(`${view}.proved`, proved ? "proved" : "not proved");
    show(`${view}.reason`, `${reason[0].toUpperCase()}${reason.slice(1)}.`);
    return `${NAMES[name]}. ${reason}`;
  }

  return { find, format, show, shown, round, Handles, slider, table, showRegime };
})();
