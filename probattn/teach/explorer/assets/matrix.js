// The editor of A = s_1 l_1 r_1^T + s_2 l_2 r_2^T: the unit circle, its image under A, and three handles. The outer dial
// rotates r_1; the two arrows end at A r_1 = s_1 l_1 and A r_2 = s_2 l_2.
const matrixEditor = page => {
  const { ink } = draw, canvas = controls.find("matrix-canvas"), layer = controls.find("matrix-handles");
  // The radius shown: it follows the arrows, except while one of them is held.
  const ZOOMS = [1.5, 3, 6], DIAL = 1.18, REACH = 1.34;
  let x = null, y = null, zoom = ZOOMS[0], held = false;
  const state = () => page.state.plane;
  const turned = (angle, length) => [length * Math.cos(angle), length * Math.sin(angle)];
  const tips = () => {
    const { left, right, s1, s2 } = state();
    return [turned(right, DIAL * zoom), turned(left, s1), turned(left + Math.PI / 2, s2)];
  };

  function paint() {
    const { s1, s2 } = state(), most = Math.max(s1, Math.abs(s2));
    if (!held) zoom = ZOOMS.find(level => most < 0.97 * level) || ZOOMS.at(-1);
    if (most > zoom) zoom = ZOOMS.find(level => most <= level);
    const { pen, width, height } = draw.surface(canvas), A = planeMathematics.matrix(state()), [dial, first, second] = tips();
    x = draw.scale(-REACH * zoom, REACH * zoom, 0, width);
    y = draw.scale(-REACH * zoom, REACH * zoom, height, 0);
    const ring = (radius, colour, dash) => draw.curve(pen, circle(u => [radius * u[0], radius * u[1]]), colour, 1, dash);
    ring(DIAL * zoom, ink.rule, []);
    for (const k of [1 / 3, 2 / 3, 1]) ring(k * zoom, ink.rule, [1, 5]);
    ring(1, ink.muted, [4, 3]);
    const image = circle(u => [A[0] * u[0] + A[1] * u[1], A[2] * u[0] + A[3] * u[1]]);
    pen.beginPath();
    image.forEach(([px, py], k) => (k ? pen.lineTo(px, py) : pen.moveTo(px, py)));
    [pen.fillStyle, pen.globalAlpha] = [ink.blue, 0.13];
    pen.fill();
    pen.globalAlpha = 1;
    draw.curve(pen, image, ink.blue, 2);
    draw.curve(pen, [[x(0), y(0)], [x(dial[0]), y(dial[1])]], ink.muted, 1.5, [4, 4]);
    draw.curve(pen, [[x(0), y(0)], [x(first[0]), y(first[1])]], ink.blue, 3);
    draw.curve(pen, [[x(0), y(0)], [x(second[0]), y(second[1])]], ink.orange, 3);
    draw.text(pen, String(zoom), x(0) + 3, y(zoom) - 2, { factor: 0.7 });
    handles.update(3);
  }

  function circle(map) {
    return Array.from({ length: 73 }, (_, k) => {
      const [px, py] = map(turned((k * Math.PI) / 36, 1));
      return [x(px), y(py)];
    });
  }

  const NAMES = ["right singular vector r₁, turn", "s₁ l₁, length and direction", "s₂ l₂, length and sign"];
  const wrap = angle => Math.round(Math.atan2(Math.sin(angle), Math.cos(angle)) * 1000) / 1000;
  const handles = new controls.Handles(layer, {
    label: k => NAMES[k],
    className: k => ["dial", "first", "second"][k],
    value(k) {
      const { left, right, s1, s2 } = state();
      const text = [`${right.toFixed(3)} radians`, `${s1.toFixed(3)} at ${left.toFixed(3)} radians`, s2.toFixed(3)][k];
      return { now: [right, s1, s2][k], text };
    },
    place: k => tips()[k].map((value, axis) => (axis ? y(value) : x(value))),
    move(k, { pixels, step }) {
      const at = state(), limit = pixels ? zoom : states.LIMIT.s;
      if (pixels) {
        held = true;
        const to = [x.invert(pixels[0]), y.invert(pixels[1])], angle = Math.atan2(to[1], to[0]);
        if (k === 0) at.right = wrap(angle);
        else if (k === 1) {
          at.s1 = controls.round(Math.min(limit, Math.hypot(...to)));
          if (at.s1 > 0.05) at.left = wrap(angle);
        } else at.s2 = controls.round(states.clamp(to[1] * Math.cos(at.left) - to[0] * Math.sin(at.left), -limit, limit));
      } else if (k === 0) at.right = wrap(at.right + step[0] + step[1]);
      else if (k === 1) {
        at.left = wrap(at.left + step[0]);
        at.s1 = controls.round(states.clamp(at.s1 + step[1], 0, limit));
      } else at.s2 = controls.round(states.clamp(at.s2 + step[0] + step[1], -limit, limit));
      page.changed();
    },
    done() {
      held = false;
      page.changed();
      page.commit();
    },
  });

  const field = name => controls.slider(`plane-${name}`, () => state()[name], value => (state()[name] = value), page.changed, page.commit);
  const sync = ["s1", "s2", "left", "right"].map(field);
  return {
    render() {
      sync.forEach(update => update());
      paint();
    },
  };
};
