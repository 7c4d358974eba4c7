// The page: one state, one frame, tabs, presets, history, links, theme. `window.probattn` is a read-only view of it.
(() => {
  const find = controls.find, VIEWS = ["line", "plane", "sequence", "sentence"];
  const calm = matchMedia("(prefers-reduced-motion: reduce)"), night = matchMedia("(prefers-color-scheme: dark)");
  const read = states.decode(location.hash);
  const page = { state: read.state || states.initial(), changed, commit };
  const history_ = new states.History(page.state);
  let waiting = false, settled = true, announced = "", timer = 0, rest = 0, ended = null;
  const frames = [];

  const views = { line: lineView(page), plane: planeView(page), sequence: sequenceView(page), sentence: sentenceView(page) };
  const stories = storyTeller({
    page, names: VIEWS, calm, showView, playing: () => views.sequence.start(), settled: words => { ended = words; },
  });

  /** Something moved: draw once in the next frame, at lower resolution if necessary. */
  function changed() {
    settled = false;
    request();
  }

  /** Nothing moves any more: draw at full resolution. */
  function settle() {
    settled = true;
    request();
  }

  function request() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(frame);
  }

  function frame() {
    waiting = false;
    const begin = performance.now();
    let news = views[page.state.view].render(settled);
    stories.render();
    if (settled && ended !== null) [news, ended] = [ended() || news, null]; // the words of a story, once they are true
    frames.push(performance.now() - begin);
    if (frames.length > 240) frames.shift();
    clearTimeout(rest);
    if (!settled) rest = setTimeout(settle, 120);
    if (news && news !== announced) {
      clearTimeout(timer);
      timer = setTimeout(() => {
        announced = news;
        find("news").textContent = news;
      }, 400);
    }
  }

  /** An interaction has ended: record it and put it into the address. */
  function commit() {
    if (stories.moving) return;
    history_.commit(page.state);
    afterwards();
  }

  function afterwards() {
    find("undo").disabled = !history_.past.length;
    find("redo").disabled = !history_.future.length;
    try {
      history.replaceState(null, "", `#${states.encode(page.state)}`);
    } catch {
      // A page inside another cannot change its address; the button still copies the link.
    }
  }

  function restore(state) {
    if (state === null) return;
    halt();
    page.state = states.checked(state);
    showView();
    changed();
    afterwards();
  }

  function halt() {
    stories.halt();
    views.sequence.stop();
  }

  function showView() {
    for (const name of VIEWS) {
      const chosen = name === page.state.view, tab = find(`tab-${name}`);
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen ? 0 : -1;
      find(name).hidden = !chosen;
    }
    stories.show();
  }

  function go(name) {
    halt();
    page.state.view = name;
    showView();
    settle();
    commit();
  }

  for (const [k, name] of VIEWS.entries()) {
    const tab = find(`tab-${name}`);
    tab.addEventListener("click", () => go(name));
    tab.addEventListener("keydown", event => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      const next = VIEWS[(k + by + VIEWS.length) % VIEWS.length];
      go(next);
      find(`tab-${next}`).focus();
    });
  }

  // History, link, theme, size.
  find("undo").addEventListener("click", () => restore(history_.undo()));
  find("redo").addEventListener("click", () => restore(history_.redo()));
  document.addEventListener("keydown", event => {
    if (!(event.ctrlKey || event.metaKey) || event.altKey) return;
    const letter = event.key.toLowerCase();
    if (letter === "z") restore(event.shiftKey ? history_.redo() : history_.undo());
    else if (letter === "y") restore(history_.redo());
    else return;
    event.preventDefault();
  });
  find("reset").addEventListener("click", () => {
    const fresh = { ...states.initial(), view: page.state.view };
    restore(fresh);
    stories.leave();
    commit();
  });
  find("link").addEventListener("click", async () => {
    const address = `${location.href.split("#")[0]}#${states.encode(page.state)}`;
    let words = "Link copied";
    try {
      await navigator.clipboard.writeText(address);
    } catch {
      words = "Copy it from the address bar";
      afterwards();
    }
    find("link").textContent = words;
    setTimeout(() => (find("link").textContent = "Copy link"), 1800);
  });
  addEventListener("hashchange", () => {
    const next = states.decode(location.hash);
    tell(next.problem);
    if (next.state && JSON.stringify(next.state) !== JSON.stringify(page.state)) {
      restore(next.state);
      commit();
    }
  });

  function tell(problem) {
    find("problem").hidden = problem === null;
    find("problem-text").textContent = problem || "";
  }
  find("problem-close").addEventListener("click", () => tell(null));

  const remembered = key => {
    try {
      return localStorage.getItem(`probattn-${key}`);
    } catch {
      return null;
    }
  };
  const remember = (key, value) => {
    try {
      localStorage.setItem(`probattn-${key}`, value);
    } catch {
      // Without storage the choice is lost with the page.
    }
  };
  let theme = remembered("theme"), large = remembered("large") === "true", folded = false;
  function dress() {
    const root = document.documentElement, dark = theme ? theme === "dark" : night.matches;
    root.dataset.theme = dark ? "dark" : "light";
    root.dataset.large = String(large);
    find("theme").textContent = dark ? "Light" : "Dark";
    find("theme").setAttribute("aria-label", dark ? "Light colours" : "Dark colours");
    find("large").setAttribute("aria-pressed", String(large));
    // A projector has no room for numbers beside the plot; they open with a click.
    if (folded !== large) for (const part of document.querySelectorAll("details.numbers")) part.open = !large;
    folded = large;
    draw.readTheme();
    changed();
  }
  find("theme").addEventListener("click", () => {
    theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    remember("theme", theme);
    dress();
  });
  find("large").addEventListener("click", () => {
    large = !large;
    remember("large", large);
    dress();
  });
  night.addEventListener("change", dress);

  // On paper: light colours, and the plots as they stand on the screen, scaled with the handles on them.
  const PAPER = 680;
  const plots = () => [...document.querySelectorAll(".plot")].filter(plot => plot.clientWidth);
  addEventListener("beforeprint", () => {
    document.documentElement.dataset.theme = "light";
    draw.readTheme();
    views[page.state.view].render(true);
    for (const [plot, width, height] of plots().map(plot => [plot, plot.clientWidth, plot.clientHeight])) {
      Object.assign(plot.style, { width: `${width}px`, height: `${height}px`, zoom: Math.min(1, PAPER / width) });
      plot.querySelector("canvas").style.height = `${height}px`;
    }
  });
  addEventListener("afterprint", () => {
    for (const plot of plots()) {
      for (const name of ["width", "height", "zoom"]) plot.style.removeProperty(name);
      plot.querySelector("canvas").style.removeProperty("height");
    }
    dress();
  });
  for (const name of VIEWS) {
    const tableOf = find(`${name}-table`);
    if (tableOf) tableOf.addEventListener("toggle", changed);
  }
  new ResizeObserver(changed).observe(find("main"));

  tell(read.problem);
  showView();
  dress();
  find("undo").disabled = find("redo").disabled = true;

  /** The displayed texts by name, with the numbers in full. */
  function numbers() {
    const shown = {};
    for (const element of document.querySelectorAll(`#${page.state.view} [data-name]`)) shown[element.dataset.name] = { text: element.textContent, value: element.dataset.value };
    return shown;
  }

  window.probattn = Object.freeze({
    version: states.VERSION,
    numbers,
    get state() { return structuredClone(page.state); },
    setState(state) {
      restore(structuredClone(state));
      stories.leave();
      commit();
    },
    curve: () => views.plane.curve(),
    witness: () => views.plane.witness(),
    path: () => views.sequence.path(),
    get frames() { return [...frames]; },
    get idle() { return !waiting && settled && !stories.moving; },
  });
})();
