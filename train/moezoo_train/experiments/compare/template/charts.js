// Three kinds of chart: rows of dots, learning curves, and loss against a size.

const ROW_HEIGHT = 25;
const NARROW = 600;

const label = (row) => (row.causal ? row.name : `${row.name} †`);

// A line per method, a column per panel; panels are put below each other where it is narrow.
function dotRows(host, rows, panels, name, pairs) {
  host.replaceChildren();
  if (!rows.length) return nothingShown(host);
  const stacked = panels.length > 1 && host.clientWidth < NARROW;
  for (const group of stacked ? panels.map((panel) => [panel]) : [panels]) {
    drawRows(host, rows, group, name, pairs);
  }
}

function drawRows(host, rows, panels, name, pairs) {
  const top = panels[0].title ? 30 : 8;
  const bottom = top + rows.length * ROW_HEIGHT;
  const [root, width] = canvasFor(host, bottom + (panels[0].axis ? 46 : 26), name);
  const widest = Math.max(...rows.map((row) => textWidth(label(row))));
  const left = Math.min(widest + 18, width * 0.42);
  const gap = 44;
  const size = (width - left - 14 - gap * (panels.length - 1)) / panels.length;
  const scales = panels.map((panel, place) => {
    const start = left + place * (size + gap);
    const scale = panel.scale(start + 6, start + size - 6, rows);
    drawPanel(root, panel, scale, start, size, top, bottom);
    return scale;
  });
  const lines = svg("g", { class: "rows" });
  rows.forEach((row, place) => {
    const middle = top + (place + 0.5) * ROW_HEIGHT;
    const line = marks(row);
    line.append(
      svg("rect", { class: "band", x: 0, y: middle - ROW_HEIGHT / 2, width, height: ROW_HEIGHT }),
      svg("text", { class: "name", x: left - 14, y: middle + 4, "text-anchor": "end" },
        clipped(label(row), left - 16, 12.5)),
    );
    panels.forEach((panel, n) => drawDot(line, panel, scales[n], row, middle));
    line.addEventListener("pointermove", (event) => {
      focusRow(row.name);
      showTooltip(event, row, label(row), pairs(row));
    });
    line.addEventListener("pointerleave", hideTooltip);
    lines.append(line);
  });
  root.append(lines);
}

function drawPanel(root, panel, scale, start, size, top, bottom) {
  if (panel.title) root.append(svg("text", { class: "name", x: start, y: 14 }, panel.title));
  const ticks = scale.ticks(Math.max(2, Math.floor(size / 70)));
  const text = panel.times ? String : tickText(ticks);
  for (const tick of ticks) {
    const x = scale(tick);
    root.append(
      svg("line", { class: "grid", x1: x, x2: x, y1: top, y2: bottom }),
      svg("text", { class: "small", x, y: bottom + 16, "text-anchor": "middle" },
        text(tick)),
    );
  }
  if (panel.mark !== undefined) {
    const x = scale(panel.mark);
    root.append(svg("line", { class: "baseline", x1: x, x2: x, y1: top - 4, y2: bottom }));
  }
  if (panel.axis) {
    const middle = start + size / 2;
    root.append(svg("text", { x: middle, y: bottom + 38, "text-anchor": "middle" }, panel.axis));
  }
}

function drawDot(line, panel, scale, row, y) {
  const value = panel.value(row), other = panel.other?.(row);
  if (value && other) {
    line.append(svg("line", { class: "link", x1: scale(value[0]), x2: scale(other[0]), y1: y, y2: y }));
  }
  for (const [mean, kind, r] of [[other, "ring", 4.6], [value, "point", 5]]) {
    if (!mean) continue;
    if (mean[1]) {
      const ends = { x1: scale(mean[0] - mean[1]), x2: scale(mean[0] + mean[1]) };
      line.append(svg("line", { class: "error", ...ends, y1: y, y2: y }));
    }
    line.append(svg("circle", { class: kind, cx: scale(mean[0]), cy: y, r }));
  }
}

// A frame with axes for the two charts that have both; gives the scales of both.
function frame(root, box, x, y, names) {
  const ticks = y.ticks(6), text = tickText(ticks);
  for (const tick of ticks) {
    root.append(
      svg("line", { class: "grid", x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) }),
      svg("text", { class: "small", x: box.left - 8, y: y(tick) + 4, "text-anchor": "end" },
        text(tick)),
    );
  }
  for (const tick of x.ticks(Math.max(2, Math.floor((box.right - box.left) / 90)))) {
    root.append(
      svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: box.top, y2: box.bottom }),
      svg("text", { class: "small", x: x(tick), y: box.bottom + 17, "text-anchor": "middle" },
        names.tick(tick)),
    );
  }
  const middle = (box.left + box.right) / 2;
  root.append(
    svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
    svg("text", { x: middle, y: box.bottom + 38, "text-anchor": "middle" }, names.x),
    svg("text", { x: 0, y: 12 }, names.y),
  );
}

// Names in a column at the right, apart from each other, each joined to its place.
function sideLabels(root, box, items) {
  const sorted = [...items].sort((a, b) => a.y - b.y);
  const places = spread(sorted.map((item) => item.y), 15, box.top - 4, box.bottom + 4);
  sorted.forEach(({ row, x, y }, n) => {
    const start = box.right + 8, bend = box.right + 26;
    const path = `M${x + 5},${y} H${Math.max(x + 5, start)} L${bend},${places[n]} h3`;
    root.append(svg("path", { class: "leader", d: path }));
    const text = svg("text", { class: "end tinted", style: tint(row), x: bend + 7, y: places[n] + 4,
      "data-row": row.name }, label(row));
    text.addEventListener("pointerenter", () => focusRow(row.name));
    text.addEventListener("pointerleave", hideTooltip);
    root.append(text);
  });
}

function sideBox(width, height, rows) {
  const room = Math.max(...rows.map((row) => textWidth(label(row), 12))) + 42;
  const labelled = width >= NARROW && rows.length * 15 < height - 70;
  return [{ left: 40, right: width - (labelled ? room : 12), top: 30, bottom: height - 48 }, labelled];
}

const AXES = {
  flops: { name: "training compute", unit: "FLOPs" },
  tokens: { name: "tokens", unit: "tokens" },
  seconds: { name: "training time", unit: "seconds" },
};

function learningCurves(host, rows, kind, ablations) {
  host.replaceChildren();
  const byName = new Map(rows.map((row) => [row.name, row]));
  const curves = data.curves.filter((curve) => byName.has(curve.row) && curve.tokens.length);
  if (!curves.length) return nothingShown(host);
  const drawn = rows.filter((row) => curves.some((curve) => curve.row === row.name));
  const height = Math.max(440, Math.min(560, 70 + 15 * drawn.length + 30));
  const [root, width] = canvasFor(host, height, "Training loss against training compute");
  const [box, labelled] = sideBox(width, height, drawn);
  const last = Math.max(...curves.map((curve) => curve[kind].at(-1)));
  const power = 3 * Math.floor(Math.log10(last) / 3);
  const scaled = kind !== "seconds" && power >= 3;
  const unit = scaled ? 10 ** power : 1;
  const x = linear(0, last / unit, box.left, box.right);
  const y = linear(data.focus[0], data.focus[1], box.bottom, box.top);
  const axis = AXES[kind];
  frame(root, box, x, y, {
    x: `${axis.name} (${scaled ? `${raised(power)} ` : ""}${axis.unit})`,
    y: "training loss (nats per token)", tick: String,
  });
  root.append(svg("clipPath", { id: "inside" }, svg("rect", {
    x: box.left, y: box.top, width: box.right - box.left + 4, height: box.bottom - box.top,
  })));
  const clip = svg("g", { "clip-path": "url(#inside)" });
  root.append(clip);
  const ends = [], hits = [];
  for (const curve of curves.sort((a, b) => b.random - a.random)) {
    const row = byName.get(curve.row);
    const points = curve.loss.map((loss, n) => [x(curve[kind][n] / unit), y(loss)]);
    hits.push({ curve, row, points });
    clip.append(drawCurve(curve, row, points, y, ablations));
    if (!curve.random) ends.push({ row, x: points.at(-1)[0], y: points.at(-1)[1] });
  }
  if (labelled) sideLabels(root, box, ends);
  listen(root, box, hits, kind, ablations);
}

function drawCurve(curve, row, points, y, ablations) {
  const group = marks(row);
  if (curve.random) {
    group.classList.add("ablation");
    if (!ablations) group.style.display = "none";
  }
  if (curve.error.every((error) => error !== null)) {
    const upper = points.map(([px], n) => `${px},${y(curve.loss[n] + curve.error[n])}`);
    const lower = points.map(([px], n) => `${px},${y(curve.loss[n] - curve.error[n])}`).reverse();
    group.append(svg("polygon", { class: "spread", points: [...upper, ...lower].join(" ") }));
  }
  const path = points.map(([px, py]) => `${px.toFixed(1)},${py.toFixed(1)}`).join(" ");
  group.append(svg("polyline", { class: curve.random ? "line random" : "line", points: path }));
  return group;
}

// Finds the curve below the pointer; the ablation of that method shows as long as it stays there.
function listen(root, box, hits, kind, ablations) {
  const spot = svg("circle", { r: 4, class: "point", display: "none" });
  const catcher = svg("rect", { class: "band", x: box.left, y: box.top,
    width: box.right - box.left, height: box.bottom - box.top });
  root.append(spot, catcher);
  const showAblation = (name) => {
    for (const group of root.querySelectorAll(".ablation")) {
      group.style.display = ablations || group.dataset.row === name ? "" : "none";
    }
  };
  const leave = () => {
    spot.setAttribute("display", "none");
    showAblation(null);
    hideTooltip();
  };
  catcher.addEventListener("pointerleave", leave);
  catcher.addEventListener("pointermove", (event) => {
    const edge = root.getBoundingClientRect();
    const at = [event.clientX - edge.left, event.clientY - edge.top];
    const visible = hits.filter(({ curve }) => ablations || !curve.random);
    const found = nearest(visible, at);
    if (!found || found.distance > 48) return leave();
    const { hit, n } = found;
    focusRow(hit.row.name);
    showAblation(hit.row.name);
    const [cx, cy] = hit.points[n];
    for (const [name, value] of Object.entries({ cx, cy, style: tint(hit.row), class: "point tinted" })) {
      spot.setAttribute(name, value);
    }
    spot.removeAttribute("display");
    const title = hit.curve.random ? `${label(hit.row)}, random routing` : label(hit.row);
    showTooltip(event, hit.row, title, curvePairs(hit, n));
  });
}

function nearest(hits, [x, y]) {
  let best = null;
  for (const hit of hits) {
    hit.points.forEach(([px, py], n) => {
      const distance = Math.hypot(0.6 * (px - x), py - y);
      if (!best || distance < best.distance) best = { hit, n, distance };
    });
  }
  return best;
}

function curvePairs({ curve, row }, n) {
  const error = curve.error[n];
  return [
    ["training loss", withError([curve.loss[n], error])],
    ["training compute", `${short(curve.flops[n])}FLOPs`],
    ["tokens", short(curve.tokens[n])],
    ["training time", `${Math.round(curve.seconds[n])} s`],
    ["validation loss, at the end", withError(curve.random ? row.random : row.loss)],
  ];
}

function scatter(host, rows, pairs) {
  host.replaceChildren();
  const shown = rows.filter((row) => row.loss && row.active);
  if (!shown.length) return nothingShown(host);
  const height = Math.max(400, Math.min(560, 100 + 15 * shown.length));
  const [root, width] = canvasFor(host, height, "Validation loss against active parameters");
  const [box, labelled] = sideBox(width, height, shown);
  const sizes = shown.map((row) => row.active);
  const wide = Math.max(...sizes) > 4 * Math.min(...sizes);
  const [from, to] = wide ? [Math.min(...sizes) / 1.3, Math.max(...sizes) * 1.3] : around(sizes);
  const x = (wide ? logarithmic : linear)(from, to, box.left, box.right);
  const ends = shown.flatMap((row) => [row.loss[0] - (row.loss[1] ?? 0), row.loss[0] + (row.loss[1] ?? 0)]);
  const y = linear(...padded(ends), box.bottom, box.top);
  frame(root, box, x, y, {
    x: "active parameters", y: "validation loss (nats per token)", tick: short,
  });
  const items = shown.map((row) => ({ row, x: x(row.active), y: y(row.loss[0]) }));
  if (labelled) sideLabels(root, box, items);
  for (const { row, x: cx, y: cy } of items) {
    const group = marks(row);
    if (row.loss[1]) {
      const [y1, y2] = [-1, 1].map((sign) => y(row.loss[0] + sign * row.loss[1]));
      group.append(svg("line", { class: "error", x1: cx, x2: cx, y1, y2 }));
    }
    group.append(
      svg("circle", { class: "point", cx, cy, r: 5.5 }),
      svg("circle", { class: "band", cx, cy, r: 11 }),
    );
    group.addEventListener("pointermove", (event) => {
      focusRow(row.name);
      showTooltip(event, row, label(row), pairs(row));
    });
    group.addEventListener("pointerleave", hideTooltip);
    root.append(group);
  }
}
