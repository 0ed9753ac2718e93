// The map from above and the strip of the latest chunks.
const style = getComputedStyle(document.documentElement);
const colour = (name) => style.getPropertyValue(`--${name}`).trim();
const KINDS = { w: "window", m: "memory", s: "sink", k: "kept", d: "dropped" };
const LOOK_M = 0.8;
const HALF_VIEW = (37.5 * Math.PI) / 180;

function prepare(canvas) {
  const scale = devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (canvas.width !== Math.round(width * scale)) canvas.width = Math.round(width * scale);
  if (canvas.height !== Math.round(height * scale)) canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return [context, width, height];
}

export function draw_map(canvas, plan, memory, camera, trail) {
  if (!plan?.size) return;
  const [context, width, height] = prepare(canvas);
  const [wide, deep] = plan.size;
  const scale = Math.min((width - 8) / wide, (height - 8) / deep);
  const left = (width - wide * scale) / 2;
  const top = (height - deep * scale) / 2;
  const at = (x, z) => [left + x * scale, top + (deep - z) * scale];
  const box = (x0, z0, x1, z1) => {
    const [a, b] = at(Math.max(x0, 0), Math.min(z1, deep));
    context.fillRect(a, b, (Math.min(x1, wide) - Math.max(x0, 0)) * scale, (Math.min(z1, deep) - Math.max(z0, 0)) * scale);
  };
  context.fillStyle = colour("ground");
  box(0, 0, wide, deep);
  context.fillStyle = colour("box");
  for (const corners of plan.boxes) box(...corners);
  context.strokeStyle = colour("soft");
  context.strokeRect(...at(0, deep), wide * scale, deep * scale);

  const tip = (x, z, yaw, turned = 0, far = LOOK_M) => {
    const angle = (yaw * Math.PI) / 180 + turned;
    return at(x + far * Math.sin(angle), z + far * Math.cos(angle));
  };
  context.lineWidth = 1.5;
  context.strokeStyle = colour("soft");
  context.beginPath();
  trail.forEach(([x, z], i) => (i ? context.lineTo(...at(x, z)) : context.moveTo(...at(x, z))));
  context.stroke();
  // A frame is a dot where it looks: a turn on the spot is seen too.
  for (const pass of ["d", "kswm"]) {
    for (const [x, z, yaw, kind] of memory) {
      if (!pass.includes(kind)) continue;
      context.fillStyle = context.strokeStyle = colour(KINDS[kind] ?? "dropped");
      if (kind !== "d") {
        context.lineWidth = 1;
        context.beginPath();
        context.moveTo(...at(x, z));
        context.lineTo(...tip(x, z, yaw));
        context.stroke();
      }
      context.beginPath();
      context.arc(...tip(x, z, yaw), kind === "d" ? 1.6 : 3.6, 0, 7);
      context.fill();
    }
  }
  if (!camera) return;
  const [x, z, yaw] = camera;
  context.fillStyle = colour("ink");
  context.save();
  context.beginPath();
  context.rect(...at(0, deep), wide * scale, deep * scale);
  context.clip();
  context.globalAlpha = 0.16;
  context.beginPath();
  context.moveTo(...at(x, z));
  for (let i = -6; i <= 6; i++) context.lineTo(...tip(x, z, yaw, (i / 6) * HALF_VIEW, 1.5));
  context.fill();
  context.restore();
  context.beginPath();
  context.arc(...at(x, z), 4.5, 0, 7);
  context.fill();
}

// Rows: what was read of the memory, steps computed, milliseconds of both sides, dB between them.
export function draw_chunks(canvas, chunks, shown) {
  const [context, width, height] = prepare(canvas);
  const label = 92;
  const column = (width - label) / shown;
  const bar = Math.max(2, column - 2);
  const rows = [
    ["frames read", 0, 0.3], ["steps computed", 0.36, 0.52], ["milliseconds", 0.58, 0.82], ["dB apart", 0.88, 1],
  ].map(([name, from, to]) => ({ name, top: from * (height - 4) + 2, high: (to - from) * (height - 4) }));
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  const most = (pick) => Math.max(1, ...chunks.map(pick).filter(Number.isFinite));
  const read_most = most((one) => Math.max(one.fast?.read ?? 0, one.dense?.read ?? 0));
  const ms_most = most((one) => 1000 * Math.max(one.fast?.seconds ?? 0, one.dense?.seconds ?? 0));
  const last = chunks.at(-1) ?? {};
  const told = [
    last.fast ? `${last.fast.read} of ${last.fast.memory.length}` : "",
    last.fast ? `${last.fast.steps[0]} of ${last.fast.steps[1]}` : "",
    `0 to ${Math.round(ms_most)}`,
    "more is closer",
  ];
  rows.forEach(({ name, top, high }, i) => {
    context.fillStyle = colour("ink");
    context.fillText(name, 0, top + Math.min(high / 2, 14) - (high > 20 ? 6 : 0));
    if (high > 20) {
      context.fillStyle = colour("soft");
      context.fillText(told[i], 0, top + Math.min(high / 2, 14) + 8);
    }
    context.fillStyle = colour("line");
    context.fillRect(label, top + high, width - label, 1);
  });
  chunks.forEach((one, i) => {
    const x = label + (shown - chunks.length + i) * column;
    const { fast, dense } = one;
    if (fast) {
      let y = rows[0].top + rows[0].high;
      for (const kind of "wmsk") {
        const count = fast.memory.filter((entry) => entry[3] === kind).length;
        const high = (count / read_most) * rows[0].high;
        context.fillStyle = colour(KINDS[kind]);
        context.fillRect(x, y - high, bar, high);
        y -= high;
      }
      const cell = rows[1].high / fast.steps[1];
      for (let step = 0; step < fast.steps[1]; step++) {
        context.fillStyle = step < fast.steps[0] ? colour("all") : colour("ground");
        context.fillRect(x, rows[1].top + rows[1].high - (step + 1) * cell, bar, cell - 1);
      }
    }
    if (dense) {
      const high = (dense.read / read_most) * rows[0].high;
      context.fillStyle = colour("off");
      context.fillRect(x, rows[0].top + rows[0].high - high - 1, bar, 2);
    }
    const ms = (side, name) => {
      if (!side) return;
      const high = ((1000 * side.seconds) / ms_most) * rows[2].high;
      context.fillStyle = colour(name);
      context.fillRect(x, rows[2].top + rows[2].high - high, bar, high);
    };
    ms(dense, "off");
    ms(fast, "all");
    if (dense?.db != null) {
      const high = (Math.min(Math.max(dense.db, 10), 50) - 10) / 40 * rows[3].high;
      context.fillStyle = colour("kept");
      context.fillRect(x, rows[3].top + rows[3].high - high, bar, high);
    }
  });
}
