// What a page owes to eyes, keys and screen readers; called by accessibility.py, each function with the page at hand.
const shown = element => {
  if (element.closest("[hidden]") || element.closest(".unseen, .hidden, .skip")) return false;
  const folded = element.closest("details:not([open])");
  if (folded && !element.closest("summary")?.parentElement?.isSameNode(folded)) return false;
  const style = getComputedStyle(element);
  return style.visibility === "visible" && style.display !== "none" && element.getClientRects().length > 0;
};
const parts = colour => {
  const found = (colour.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number);
  return { rgb: found.slice(0, 3), alpha: found.length > 3 ? found[3] : 1 };
};
const over = (top, below, alpha) => top.map((c, k) => alpha * c + (1 - alpha) * below[k]);
const light = rgb => {
  const [r, g, b] = rgb.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const describe = element => `${element.tagName.toLowerCase()}${element.id ? "#" + element.id : ""}${
  element.classList.length ? "." + [...element.classList].join(".") : ""} "${(element.textContent || "").trim().slice(0, 30)}"`;
const nameOf = element => {
  const by = element.getAttribute("aria-labelledby");
  const told = element.getAttribute("aria-label") || (by && by.split(" ").map(id => document.getElementById(id)?.textContent).join(" "));
  return (told || [...(element.labels || [])].map(label => label.textContent).join(" ") || element.getAttribute("alt")
    || (element.matches("input, select, canvas, svg, img") ? "" : element.textContent) || element.title || "").trim();
};

function contrastFaults() {
  const wrong = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest("script, style, noscript, option, :disabled") || !shown(element)) continue;
    const layers = [];
    let behind = element, picture = false;
    for (; behind; behind = behind.parentElement) {
      const style = getComputedStyle(behind);
      // A text on a gradient has an ink of its own for each colour, which is tested where it is chosen.
      picture = picture || style.backgroundImage.includes("gradient(") && behind.matches("span, i");
      const layer = parts(style.backgroundColor);
      if (layer.alpha > 0) layers.push(layer);
      if (layer.alpha === 1) break;
    }
    if (picture) continue;
    const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
    let paper = dark ? [18, 18, 18] : [255, 255, 255];
    for (const layer of layers.reverse()) paper = over(layer.rgb, paper, layer.alpha);
    const style = getComputedStyle(element), pen = parts(style.color), ink = over(pen.rgb, paper, pen.alpha);
    const [a, b] = [light(ink), light(paper)], ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize), big = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (big ? 3 : 4.5) - 1e-6) wrong.push(`${describe(element)}: ${ratio.toFixed(2)}`);
  }
  return [...new Set(wrong)];
}

function structureFaults() {
  const wrong = [];
  if (!document.documentElement.lang) wrong.push("no language");
  if (!document.title.trim()) wrong.push("no title");
  if (!document.querySelector("main")) wrong.push("no main part");
  for (const element of document.querySelectorAll("a[href], button, input, select, textarea, summary, canvas, img, [role]")) {
    if (!shown(element) || element.getAttribute("aria-hidden") === "true" || element.closest("[aria-hidden='true']")) continue;
    if (["status", "alert", "tablist", "presentation"].includes(element.getAttribute("role"))) continue;
    if (!nameOf(element)) wrong.push(`no name: ${describe(element)}`);
  }
  const seen = new Set();
  for (const { id } of document.querySelectorAll("[id]")) {
    if (seen.has(id)) wrong.push(`id used twice: ${id}`);
    seen.add(id);
  }
  let level = 0;
  for (const heading of document.querySelectorAll("h1, h2, h3, h4")) {
    if (!shown(heading)) continue;
    const next = Number(heading.tagName[1]);
    if (next > level + 1) wrong.push(`heading skips a level: ${describe(heading)}`);
    level = next;
  }
  for (const table of document.querySelectorAll("table")) if (shown(table) && !table.querySelector("th[scope]")) wrong.push(`no headings: ${describe(table)}`);
  return wrong;
}

function watchFocus() {
  for (const element of document.querySelectorAll("[data-wanted]")) delete element.dataset.wanted;
  const all = document.querySelectorAll("a[href], button, input, select, textarea, summary, [tabindex]");
  let count = 0;
  for (const element of all) {
    if (element.tabIndex < 0 || element.disabled || (!shown(element) && !element.matches(".skip"))) continue;
    element.dataset.wanted = String(count++);
  }
  document.activeElement?.blur();
  window.focusLook = element => {
    const style = getComputedStyle(element), inner = getComputedStyle(element, "::before");
    return [style.outlineStyle, style.outlineWidth, style.outlineColor, style.boxShadow, inner.boxShadow].join();
  };
  window.plainLook = new Map([...document.querySelectorAll("[data-wanted]")].map(element => [element, focusLook(element)]));
  return count;
}

function focused() {
  const element = document.activeElement;
  if (!element || element === document.body || element.dataset.wanted === undefined) return null;
  const look = focusLook(element), marked = element.querySelector("i");
  return { key: element.dataset.wanted, name: describe(element), seen: look !== plainLook.get(element) || marked !== null };
}

function notReached(reached) {
  return [...document.querySelectorAll("[data-wanted]")].filter(element => !reached.includes(element.dataset.wanted)).map(describe);
}
