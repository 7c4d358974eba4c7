// Stories: what a preset shows, told in steps. Each step moves the state and then says what is on the screen; names in
// braces stand for the numbers that are displayed.
const storyTeller = ({ page, names, calm, showView, playing, settled }) => {
  const find = controls.find, SECONDS = 2.4;
  let told = null, place = null, at = 0, animation = null, byHand = false;

  for (const name of names) {
    for (const chosen of presets[name]) {
      const button = document.createElement("button");
      Object.assign(button, { type: "button", textContent: chosen.title, id: chosen.id });
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => begin(name, chosen));
      find(`${name}-presets`).append(button);
    }
    find(`${name}-back`).addEventListener("click", () => go(at - 1));
    find(`${name}-next`).addEventListener("click", () => go(at + 1));
  }

  /** The words of a step with the displayed numbers in them. */
  const words = text => text.replace(/\{([\w.]+)\}/g, (_, name) => controls.shown(name));

  /** The state of a preset after so many steps: everything that they have set. */
  const after = count => Object.assign({}, told.from, ...told.steps.slice(0, count + 1).map(step => step.to || {}));

  function begin(name, chosen) {
    halt();
    [told, place, at, byHand] = [chosen, name, 0, false];
    page.state.view = name;
    page.state = states.checked({ ...page.state, [name]: structuredClone({ ...page.state[name], ...chosen.from, ...(chosen.play ? after(0) : {}) }) });
    showView();
    if (!chosen.play) return go(0);
    page.changed();
    page.commit();
    show();
    playing();
  }

  function go(next) {
    halt();
    const from = structuredClone(page.state[place]), to = after(next);
    [at, byHand] = [next, false];
    show();
    if (calm.matches || JSON.stringify({ ...from, ...to }) === JSON.stringify(from)) return finish(to);
    const mine = (animation = { start: null });
    const step = now => {
      if (animation !== mine) return;
      mine.start ??= now;
      const t = Math.min(1, (now - mine.start) / 1000 / SECONDS), smooth = t * t * (3 - 2 * t);
      if (t === 1) return finish(to);
      Object.assign(page.state[place], between(from, to, smooth));
      page.changed();
      requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  function finish(to) {
    animation = null;
    Object.assign(page.state[place], structuredClone(to));
    page.changed();
    page.commit();
    settled(() => told && words(told.steps[at].text));
  }

  /** Interpolate the numbers that two states share, at any depth; what does not fit jumps at the end. */
  function between(from, to, t) {
    if (typeof from === "number" && typeof to === "number") return from + (to - from) * t;
    if (Array.isArray(from) && Array.isArray(to) && from.length === to.length) return from.map((value, k) => between(value, to[k], t));
    if (to !== null && typeof to === "object" && !Array.isArray(to)) return Object.fromEntries(Object.keys(to).map(key => [key, between(from[key], to[key], t)]));
    return from;
  }

  /** Stop what moves, and leave it where it is. */
  function halt() {
    const moved = animation !== null;
    animation = null;
    return moved;
  }

  function leave() {
    halt();
    told = null;
    show();
  }

  function show() {
    for (const name of names) {
      const open = told !== null && place === name && page.state.view === name;
      find(`${name}-preset`).hidden = !open;
      for (const other of presets[name]) find(other.id).setAttribute("aria-pressed", String(open && other === told));
    }
    if (told === null) return;
    const many = told.steps.length > 1;
    find(`${place}-back`).hidden = find(`${place}-next`).hidden = find(`${place}-turn`).hidden = !many;
    find(`${place}-back`).disabled = at === 0;
    find(`${place}-next`).disabled = at === told.steps.length - 1;
    find(`${place}-turn`).textContent = `${at + 1} of ${told.steps.length}${byHand ? ", moved by hand" : ""}`;
    render();
  }

  /** Write the words anew, because a number has changed. */
  function render() {
    if (told === null || place !== page.state.view) return;
    const text = words(told.steps[at].text), element = find(`${place}-words`);
    if (element.textContent !== text) element.textContent = text;
  }

  // What a clicker sends, and a hand that stops the motion.
  document.addEventListener("keydown", event => {
    if (told === null || place !== page.state.view || event.ctrlKey || event.altKey || event.metaKey) return;
    const next = { PageDown: at + 1, PageUp: at - 1 }[event.key];
    if (next === undefined || event.target.matches?.("input, select")) return;
    event.preventDefault();
    if (told.steps[next]) go(next);
  });
  document.addEventListener("pointerdown", event => {
    if (event.target.closest(".handle, input")) hand();
  }, true);
  document.addEventListener("keydown", event => {
    if (event.target.closest?.(".handle, input") && event.key !== "Tab") hand();
  }, true);

  function hand() {
    const moved = halt();
    if (told !== null && !told.play) {
      byHand = true;
      show();
    }
    if (moved) page.commit();
  }

  return { show, render, halt, leave, get moving() { return animation !== null; } };
};
