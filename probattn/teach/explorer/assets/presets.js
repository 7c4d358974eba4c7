// Presets: a state to begin with, and the steps of a story: parts of the state of one view, and words in which names in
// braces stand for displayed numbers.
const presets = (() => {
  const pair = [-1, 1];
  const corners = [[1, 1], [1, -1], [-1, 1], [-1, -1]];
  // Squares about the centre that grow, so that no token of the sequence has a negative determinant. Their mean
  // variance is 2.24 / 3, and twice its reciprocal makes both eigenvalues of J at the centre -1.
  const squares = [0.4, 0.8, 1.2].flatMap(r => corners.map(([x, y]) => [r * x, r * y]));
  const scattered = [[-1.6, -0.9], [-0.9, 0.8], [0.9, -1.5], [0.2, 1.7], [1.7, -0.4]];
  const tilted = { left: 0.5, right: 0.2, s1: 1, s2: 0.3, support: 1 };
  const line = (tokens, noise) => ({ tokens, sigma: 0.5, radius: 0, noise });
  const plane = tokens => ({ tokens, left: 0, right: 0, kind: "determinant", support: 1 });
  const both = s => ({ s1: s, s2: s });
  /** The cell of the real sentence that is nearest to the boundary, without the first token. */
  function sentenceNearest(map, kind) {
    let [token, layer, least] = [1, 0, Infinity];
    sentenceData.margins[map][kind].forEach((row, l) => row.forEach((value, t) => {
      if (t > 0 && value !== null && Math.abs(value) < least) [token, layer, least] = [t, l, Math.abs(value)];
    }));
    return { token, layer };
  }
  const path = (a, level, rest) => ({ a, sigma: Math.sqrt(level / Math.abs(a)), radius: 0, n: 0, ...rest });

  return {
    line: [
      {
        id: "line-boundary", title: "Approach the boundary", from: { ...line([...pair, 0], 0), a: 0.2 },
        steps: [
          { to: { a: 0.6 }, text: "Two tokens at ±1 and the query u between them, so that e(u) = u − tanh(a u). At a = {line.a} the slope of the map is J = {line.margin}: a little noise is stretched by {line.gain} on its way to the token." },
          { to: { a: 0.99 }, text: "The nearer a comes to 1, the flatter the map: J = {line.margin}, noise is stretched by {line.gain}, and the barrier −log|J| is {line.barrier}. It has no bound." },
          { text: "The blue density carries the factor |J|, and its mass is {line.mass}. Without the factor, dashed, the mass would be {line.without}." },
        ],
      },
      {
        id: "line-fold", title: "Fold", from: { ...line([...pair, 0], 0.1), a: 0.3 },
        steps: [
          { to: { a: 0.9 }, text: "a = {line.a}: the map rises everywhere. The noise ε = {line.noise} has {line.count} root, and the mass is {line.mass}." },
          { to: { a: 3 }, text: "a = {line.a}: in the orange band the map turns back. The same noise has {line.count} roots, the diamonds." },
          { text: "Even with its Jacobian the density now integrates to {line.mass}, the mean number of roots. It is a density only after division by that, and the generator needs a rule to choose a root." },
        ],
      },
      {
        id: "line-bounded", title: "Bounded memory", from: { ...line([...pair, 0], 0.1), a: 3, radius: 4 },
        steps: [
          { text: "A fold again: a = {line.a}, {line.count} roots, mass {line.mass}. Keys and values see the tokens on a ball, so large (ρ = {line.radius}) that it changes little." },
          { to: { radius: 0.5 }, text: "The ball shrinks to ρ = {line.radius}, and the fold is gone: {line.count} root, mass {line.mass}, regime {line.regime}." },
          { to: { tokens: [-3, 3, 0] }, text: "The tokens move apart as far as the page allows, and nothing folds: J = {line.margin}. With |a| ρ² below one the map is one-to-one after every past." },
        ],
      },
      {
        id: "line-runaway", title: "Literal barrier runs away", from: { ...line([...pair, 0], 0), a: 0.5 },
        steps: [
          { to: { a: -2 }, text: "Repulsion, a = {line.a}: J = 1 − a Var is {line.margin}, beyond one, so that the literal barrier −log|J| is negative, {line.barrier}." },
          { to: { a: -10 }, text: "And so it goes on: at a = {line.a} it is {line.barrier}, at a residual of {line.e}. To minimise it with a free attention runs away; a barrier that serves as a penalty has to be one-sided." },
        ],
      },
    ],
    plane: [
      {
        id: "plane-boundary", title: "Approach the boundary",
        from: { tokens: [...scattered, [2.4, 1.8]], ...tilted, kind: "singular_value" },
        steps: [
          { to: { tokens: [...scattered, [1.1, 0.8]] }, text: "The query moves towards the curve det J = 0. Its smallest singular value, the distance to a singular block, is {plane.singular_value}." },
          { to: { tokens: [...scattered, [0.22, 0.07]] }, text: "Close to the curve it is {plane.singular_value}: noise is amplified by {plane.gain} in the worst direction. The support token of the sequence is number {plane.support}, the query." },
          { text: "Drag the query across the curve: its determinant, now {plane.determinant}, changes sign. The regime is {plane.regime} all along, because the next token could lie beyond the curve; a positive determinant at the query does not change that." },
        ],
      },
      {
        id: "plane-fold", title: "Fold", from: { ...plane([...corners, [0, 0]]), s1: 0.4, s2: 0.4 },
        steps: [
          { to: { s1: 0.9 }, text: "One singular value is turned up: at s₁ = {plane.s1} the determinant at the query is {plane.determinant}." },
          { to: { s1: 2 }, text: "At s₁ = {plane.s1} the map has folded along that direction, and the query's noise has {plane.count} solutions, the diamonds and the query. One token with det J = {plane.determinant} proves it." },
        ],
      },
      {
        id: "plane-two-folds", title: "Two folds, positive determinant", from: { ...plane([...squares, [0, 0]]), ...both(0.6) },
        steps: [
          { to: both(1.2), text: "Both directions are turned up together. The determinant at the query has gone down to {plane.determinant}." },
          { to: both(2 / (2.24 / 3)), text: "Further up it comes back: det J = {plane.determinant}, the same as without attention. Yet both directions are folded, and the noise has {plane.count} solutions." },
          { to: { kind: "spectral" }, text: "The map of the spectral margin, {plane.spectral} at the query, shows it. No token of this sequence has a negative determinant: a positive determinant at the data proves nothing." },
        ],
      },
      {
        id: "plane-runaway", title: "Literal barrier runs away",
        from: { ...plane([...corners, [0, 0]]), left: Math.PI, ...both(0.2) },
        steps: [
          { to: both(2), text: "A = −{plane.s1} I: the attention repels. At the centre det J = {plane.determinant}, and the literal barrier is {plane.barrier}." },
          { to: both(6), text: "At A = −{plane.s1} I it is {plane.barrier}, with no bound below, while the residual is zero. Nothing stops a training run with this reward, and all margins look excellent." },
        ],
      },
    ],
    sequence: [
      {
        id: "sequence-below", title: "Below 4/27", play: true, from: path(1, 0.05, { seed: 3, speed: 4 }),
        steps: [{ text: "a σ² = {sequence.level} lies below the top of the curve. After {sequence.n} tokens the spread is {sequence.spread}, near the mean-field value {sequence.V}, on the rising branch. The mean, {sequence.mean}, does not settle: it drifts as a small power of n." }],
      },
      {
        id: "sequence-above", title: "Above 4/27", play: true, from: path(1, 0.25, { seed: 3, speed: 1 }),
        steps: [{ text: "a σ² = {sequence.level} lies above the curve: no spread V reproduces itself. After {sequence.n} tokens it is {sequence.spread}, the last token {sequence.last}. At the top of the curve, where stationarity ends, the typical margin 1 − aV is still 2/3." }],
      },
      {
        id: "sequence-bounded", title: "Bounded memory", play: true, from: path(1, 0.25, { radius: 0.9, seed: 3, speed: 4 }),
        steps: [{ text: "The same noise, a σ² = {sequence.level}, but the past is seen on a ball of radius {sequence.radius}: a ρ² = {sequence.kappa} is below one, and no past folds. After {sequence.n} tokens the spread is {sequence.spread}; in the long run the mean square is {sequence.bounded}." }],
      },
      {
        id: "sequence-drift", title: "The mean drifts", play: true, from: path(1, 0.13, { seed: 7, speed: 8 }),
        steps: [{ text: "a σ² = {sequence.level}, still below 4/27. The mean drifts as n to the power {sequence.drift}, and a moving mean widens the sample until the spread, {sequence.spread} after {sequence.n} tokens, crosses the boundary from below. This path escapes after a thousand quiet tokens; others sooner, later, or not within 2000." }],
      },
      {
        id: "sequence-repulsion", title: "Repulsion is stable", play: true, from: path(-2, 0.98, { seed: 2, speed: 4 }),
        steps: [{ text: "With a = {sequence.a} mean field has a solution for every noise; here it is {sequence.V}, and the spread after {sequence.n} tokens is {sequence.spread}. The mean is pulled back to 0. Nothing folds: J = {sequence.sampled} exceeds one, and the literal barrier is negative." }],
      },
    ],
    sentence: [
      {
        id: "sentence-nearest", title: "Nearest to the boundary", from: { map: "generator", kind: "sigma_min", token: 0, layer: 0 },
        steps: [
          { text: "A row for each token of the sentence, a cell for each layer. Attention that does nothing would leave every cell without colour; orange is the way to the boundary." },
          { to: { ...sentenceNearest("generator", "sigma_min") }, text: "Nearest, the first token aside, is “{sentence.nearest}” in layer {sentence.nearestLayer}, with a smallest singular value of {sentence.nearestMargin}. It is a support token of the sentence." },
          { to: { kind: "logabsdet" }, text: "The determinant tells another story: here “{sentence.nearest}” in layer {sentence.nearestLayer} is first, with log|det J| = {sentence.nearestMargin}, and {sentence.beyond} blocks have a negative determinant." },
        ],
      },
      {
        id: "sentence-update", title: "Generator and update", from: { map: "generator", kind: "spectral", token: 8, layer: 10 },
        steps: [
          { text: "The generator’s map u − μ(u), whose determinant makes a density: {sentence.beyond} blocks have a real eigenvalue beyond the boundary." },
          { to: { map: "update" }, text: "The map u + μ(u) is what the network does to the token. Its boundary lies elsewhere: {sentence.beyond} blocks are beyond it. A small margin is not fragility, and a large one is no achievement of training." },
        ],
      },
    ],
  };
})();
