// The state, its history, and its encoding in a link. Everything on the page is a function of the state.
const states = (() => {
  const VERSION = 1;
  const LIMIT = { token: 3, tokens: 32, a: 10, sigma: [0.02, 2], noise: 4, radius: 4, s: 6, sequence: { a: 4, sigma: [0.02, 2], n: 2000 } };

  const initial = () => ({
    view: "line",
    // The noise of the query itself, so that the query is one of the roots.
    line: { tokens: [-1, 1, 0.35], a: 1.8, sigma: 0.5, radius: 0, noise: lineMathematics.residual([-1, 1], 1.8, 0.35) },
    plane: {
      tokens: [[-1.6, -0.9], [-0.9, 0.8], [0.9, -1.5], [0.2, 1.7], [1.7, -0.4], [0.7, 0.5]],
      left: 0.5, right: 0.2, s1: 1, s2: 0.3, kind: "determinant", support: 2,
    },
    sequence: { a: 1, sigma: 0.31, radius: 0, seed: 1, n: 100, speed: 4 },
    sentence: { map: "generator", kind: "sigma_min", token: 8, layer: 10 },
  });

  const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
  const number = (x, low, high) => {
    if (typeof x !== "number" || !Number.isFinite(x)) throw new Error("a number is missing");
    return clamp(x, low, high);
  };
  const whole = (x, low, high) => Math.round(number(x, low, high));
  const list = (tokens, read) => {
    if (!Array.isArray(tokens) || tokens.length < 2 || tokens.length > LIMIT.tokens) throw new Error("between 2 and 32 tokens are needed");
    return tokens.map(read);
  };

  /** Read every field of a state, check it and clamp it to its limits; throw if one is missing. */
  function checked({ view, line, plane, sequence, sentence = initial().sentence }) {
    if (!["line", "plane", "sequence", "sentence"].includes(view)) throw new Error("an unknown view");
    if (!["generator", "update"].includes(sentence.map)) throw new Error("an unknown map");
    if (!["sigma_min", "logabsdet", "spectral", "complex"].includes(sentence.kind)) throw new Error("an unknown margin");
    if (!["determinant", "spectral", "singular_value"].includes(plane.kind)) throw new Error("an unknown margin");
    const token = x => number(x, -LIMIT.token, LIMIT.token), turn = x => number(x, -100, 100);
    return {
      view,
      line: {
        tokens: list(line.tokens, token), a: number(line.a, -LIMIT.a, LIMIT.a), sigma: number(line.sigma, ...LIMIT.sigma),
        noise: number(line.noise, -LIMIT.noise, LIMIT.noise), radius: number(line.radius ?? 0, 0, LIMIT.radius),
      },
      plane: {
        tokens: list(plane.tokens, pair => [token(pair[0]), token(pair[1])]), left: turn(plane.left), right: turn(plane.right),
        s1: number(plane.s1, 0, LIMIT.s), s2: number(plane.s2, -LIMIT.s, LIMIT.s), kind: plane.kind, support: whole(plane.support, 0, 8),
      },
      sequence: {
        a: number(sequence.a, -LIMIT.sequence.a, LIMIT.sequence.a), sigma: number(sequence.sigma, ...LIMIT.sequence.sigma),
        radius: number(sequence.radius ?? 0, 0, LIMIT.radius), seed: whole(sequence.seed, 0, 999999), n: whole(sequence.n, 0, LIMIT.sequence.n), speed: whole(sequence.speed, 1, 40),
      },
      sentence: {
        map: sentence.map, kind: sentence.kind, token: whole(sentence.token, 0, sentenceData.tokens.length - 1),
        layer: whole(sentence.layer, 0, sentenceData.layers - 1),
      },
    };
  }

  /** The fragment of a link: the version in the clear, then the state. */
  const encode = state => `v${VERSION}.` + btoa(JSON.stringify(state)).replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");

  /** The state of a fragment, or the reason why it cannot be read; both null for an empty one. */
  function decode(fragment) {
    const text = fragment.replace(/^#/, "");
    if (text === "") return { state: null, problem: null };
    const parts = /^v(\d+)\.([\w-]+)$/.exec(text);
    if (parts === null) return { state: null, problem: "This link does not hold a state of the explorer; the page shows the initial state instead." };
    if (Number(parts[1]) !== VERSION) {
      return { state: null, problem: `This link was made by another version of the explorer (state ${Number(parts[1])}, this page reads ${VERSION}); the page shows the initial state instead. Open the link with the version that made it.` };
    }
    try {
      return { state: checked(JSON.parse(atob(parts[2].replace(/-/g, "+").replace(/_/g, "/")))), problem: null };
    } catch {
      return { state: null, problem: "The state in this link is damaged, perhaps truncated; the page shows the initial state instead." };
    }
  }

  /** Past, present and undone states, as text so that they cannot change. */
  class History {
    constructor(state) {
      [this.past, this.now, this.future] = [[], JSON.stringify(state), []];
    }
    commit(state) {
      const text = JSON.stringify(state);
      if (text === this.now) return false;
      this.past.push(this.now);
      if (this.past.length > 200) this.past.shift();
      [this.now, this.future] = [text, []];
      return true;
    }
    undo() {
      if (!this.past.length) return null;
      this.future.push(this.now);
      this.now = this.past.pop();
      return JSON.parse(this.now);
    }
    redo() {
      if (!this.future.length) return null;
      this.past.push(this.now);
      this.now = this.future.pop();
      return JSON.parse(this.now);
    }
  }

  return { VERSION, LIMIT, initial, checked, encode, decode, clamp, History };
})();
