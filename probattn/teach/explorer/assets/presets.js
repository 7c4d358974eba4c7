// Presets: initial state, final state and explanation. `from` and `to` are parts of the state of one view.
const presets = (() => {
  const pair = [-1, 1];
  const corners = [[1, 1], [1, -1], [-1, 1], [-1, -1]];
  // Squares about the centre that grow, so that no token of the sequence has a negative determinant. Their mean
  // variance is 2.24 / 3, and twice its reciprocal makes both eigenvalues of J at the centre -1.
  const squares = [0.4, 0.8, 1.2].flatMap(r => corners.map(([x, y]) => [r * x, r * y]));
  const scattered = [[-1.6, -0.9], [-0.9, 0.8], [0.9, -1.5], [0.2, 1.7], [1.7, -0.4]];
  const tilted = { left: 0.5, right: 0.2, s1: 1, s2: 0.3, support: 1 };
  const line = tokens => ({ tokens, sigma: 0.5, noise: 0.1 });
  const same = s => ({ left: 0, right: 0, s1: s, s2: s });

  return {
    line: [
      {
        id: "line-boundary", title: "Approach the boundary",
        from: { ...line([...pair, 0]), a: 0.2, noise: 0 }, to: { ...line([...pair, 0]), a: 0.99, noise: 0 },
        text: "Two tokens at ±1 and a third between them: e(u) = u − tanh(a u). As a grows to 1 the slope of e at 0, which is the margin 1 − a Var, goes to 0. The barrier b = −log|J| grows without bound, and the gain from noise to token is 1/J. The factor |J| keeps the density proper, with Z = 1; without it the mass exceeds 1.",
      },
      {
        id: "line-fold", title: "Fold",
        from: { ...line([...pair, 0]), a: 0.6, noise: 0.1 }, to: { ...line([...pair, 0]), a: 3, noise: 0.1 },
        text: "Beyond a = 1 the map turns back: some noise has three solutions, and the density, even with its Jacobian, integrates to their mean number Z. It is a density only after division by Z, and the generator needs a rule to choose a root.",
      },
      {
        id: "line-runaway", title: "Literal barrier runs away",
        from: { ...line([...pair, 0]), a: 0.5, noise: 0 }, to: { ...line([...pair, 0]), a: -10, noise: 0 },
        text: "With repulsion, a = −c, the tokens at ±1 and u = 0 give J = 1 + c, so b = −log(1 + c): negative and unbounded below as c grows, at zero residual. Minimising this penalty with a free attention runs away. A barrier that serves as a penalty has to be one-sided.",
      },
    ],
    plane: [
      {
        id: "plane-boundary", title: "Approach the boundary",
        from: { tokens: [...scattered, [2.4, 1.8]], ...tilted, kind: "singular_value" },
        to: { tokens: [...scattered, [0.22, 0.07]], ...tilted, kind: "singular_value" },
        text: "The query moves towards the curve det J = 0. The smallest singular value is the distance to a singular block, and its reciprocal is the amplification of the noise in the worst direction. The query becomes the support token of the sequence. Drag it across the curve: the determinant changes sign. The regime is folded throughout, because the next token could lie beyond the curve; a positive determinant at the query does not change that.",
      },
      {
        id: "plane-fold", title: "Fold",
        from: { tokens: [...corners, [0, 0]], left: 0, right: 0, s1: 0.7, s2: 0.4, kind: "determinant", support: 1 },
        to: { tokens: [...corners, [0, 0]], left: 0, right: 0, s1: 2, s2: 0.4, kind: "determinant", support: 1 },
        text: "One singular value grows until 1 − s₁ Var is negative. The map folds along that direction, and the query's noise has three solutions (diamonds). One token with det J < 0 proves it.",
      },
      {
        id: "plane-two-folds", title: "Two folds, positive determinant",
        from: { tokens: [...squares, [0, 0]], ...same(0.6), kind: "determinant", support: 1 },
        to: { tokens: [...squares, [0, 0]], ...same(2 / (2.24 / 3)), kind: "determinant", support: 1 },
        text: "Both directions are folded at the query, and det J = (1 − 2)² = 1, the same as without attention. No token of this sequence has a negative determinant. Yet the spectral margin is −1 and the noise has nine solutions (diamonds): a positive determinant at the data proves nothing. Switch the map to the spectral margin.",
      },
      {
        id: "plane-runaway", title: "Literal barrier runs away",
        from: { tokens: [...corners, [0, 0]], left: Math.PI, right: 0, s1: 0.2, s2: 0.2, kind: "determinant", support: 1 },
        to: { tokens: [...corners, [0, 0]], left: Math.PI, right: 0, s1: 6, s2: 6, kind: "determinant", support: 1 },
        text: "A = −c I: the attention repels. At the centre det J = (1 + c)² and b = −2 log(1 + c), unbounded below as c grows, while the residual is zero. Nothing stops a training run with this reward, and all margins look excellent.",
      },
    ],
    sequence: [
      {
        id: "sequence-below", title: "Below 4/27", play: true, to: { a: 1, sigma: Math.sqrt(0.05), seed: 3, n: 0, speed: 4 },
        text: "a σ² = 0.05. The spread settles near the mean-field value V, on the rising branch of V(1 − aV)² = σ². The mean does not settle: it drifts as a small power of n, and in the long run it widens the spread.",
      },
      {
        id: "sequence-above", title: "Above 4/27", play: true, to: { a: 1, sigma: Math.sqrt(0.25), seed: 3, n: 0, speed: 1 },
        text: "a σ² = 0.25. No spread V reproduces itself: each token is spread more widely than its past, and the variance grows by orders of magnitude within a few hundred tokens. In the end each token attends only to the farthest one and lands beyond it. At 4/27, where stationarity ends, the typical margin 1 − aV is still 2/3.",
      },
      {
        id: "sequence-drift", title: "The mean drifts", play: true, to: { a: 1, sigma: Math.sqrt(0.13), seed: 7, n: 0, speed: 8 },
        text: "a σ² = 0.13, still below 4/27 = 0.148. The mean of an attractive process drifts as n to the power aV/(1 − aV). A moving mean widens the sample until the spread crosses the boundary from below: after a thousand quiet tokens this path escapes, although mean field has a stationary spread. Paths with other seeds escape sooner, later, or not within 2000 tokens.",
      },
      {
        id: "sequence-repulsion", title: "Repulsion is stable", play: true, to: { a: -2, sigma: 0.7, seed: 2, n: 0, speed: 4 },
        text: "With a < 0 the mean-field equation has a solution for every noise, the spread is smaller than σ², and the mean is pulled back to 0. Nothing folds: J = 1 + |a| Var exceeds one, and the literal barrier is negative.",
      },
    ],
  };
})();
