// Puts the page together and answers its controls.

const data = JSON.parse(byId("data").textContent);
const chosen = new Set(data.rows.map((row) => row.name));
const FEW = 8;

const shownRows = () => data.rows.filter((row) => chosen.has(row.name));
const baseline = data.rows.find((row) => row.name === data.baseline);

function describe(row) {
  const pairs = [["validation loss", withError(row.loss)]];
  if (row.random) pairs.push(["random routing", withError(row.random)]);
  if (row.gain) pairs.push(["random − own", withError(row.gain)]);
  const wanted = ["bits/byte", "active", "parameters", "tokens/s", "peak memory"];
  for (const [place, column] of data.columns.entries()) {
    if (wanted.includes(column.name) && row.cells[place] !== data.nothing) {
      pairs.push([column.name, row.cells[place]]);
    }
  }
  return pairs;
}

function lossPanel() {
  const found = shownRows().flatMap((row) => [row.loss, row.random]).filter(Boolean);
  const values = found.flatMap(([value, error]) => [value - (error ?? 0), value + (error ?? 0)]);
  if (baseline?.loss) values.push(baseline.loss[0]);
  const panel = {
    value: (row) => row.loss,
    other: (row) => row.random,
    axis: "validation loss (nats per token)",
    scale: (start, end) => linear(...padded(values), start, end),
  };
  return baseline?.loss ? { ...panel, mark: baseline.loss[0] } : panel;
}

const LOADS = [
  { name: "evenness", title: "evenness", digits: 2 },
  { name: "usage", title: "used", digits: 2 },
  { name: "busiest", title: "busiest ÷ mean", digits: 1 },
  { name: "unevenness", title: "unevenness (nats)", digits: 2 },
];

function loadPanels(rows) {
  return LOADS.filter(({ name }) => rows.some((row) => row.load[name])).map(({ name, title }) => ({
    title,
    times: name === "busiest",
    value: (row) => row.load[name],
    scale: (start, end) => {
      const largest = Math.max(...rows.map((row) =>
        row.load[name] ? row.load[name][0] + (row.load[name][1] ?? 0) : 0));
      if (name === "busiest") return logarithmic(1, Math.max(2, largest * 1.1), start, end);
      return linear(0, name === "unevenness" ? Math.max(0.1, largest * 1.05) : 1, start, end);
    },
  }));
}

function loadPairs(row) {
  return LOADS.filter(({ name }) => row.load[name])
    .map(({ name, title, digits }) => [title, withError(row.load[name], digits)]);
}

function drawAll() {
  const rows = shownRows();
  dotRows(byId("loss"), rows.filter((row) => row.loss), [lossPanel()],
    "Validation loss of every method and of its random routing", describe);
  scatter(byId("parameters"), rows, describe);
  if (data.curves.length) {
    const axis = document.querySelector("#axis input:checked").value;
    learningCurves(byId("compute"), rows, axis, byId("ablations").checked);
  }
  const counting = rows.filter((row) => Object.keys(row.load).length);
  if (!byId("load-card").hidden) {
    dotRows(byId("load"), counting, counting.length ? loadPanels(counting) : [],
      "How evenly experts, slots or neurons are used", loadPairs);
  }
  for (const line of byId("table").tBodies[0].rows) line.hidden = !chosen.has(line.dataset.row);
}

function buildHeading() {
  byId("title").textContent = data.title;
  byId("subtitle").textContent = data.subtitle;
  byId("lead").textContent = data.notes[0] ?? "";
  const causal = data.rows.filter((row) => row.causal && row.loss);
  const best = causal.reduce((a, b) => (!a || b.loss[0] < a.loss[0] ? b : a), null);
  const tested = data.rows.filter((row) => row.gain);
  const ahead = tested.filter((row) => row.gain[0] > 0);
  const tiles = [];
  if (best) tiles.push(["lowest validation loss", withError(best.loss), best.name]);
  if (baseline?.loss) tiles.push(["the baseline", withError(baseline.loss), baseline.name]);
  if (tested.length) {
    tiles.push(["better than own random routing", `${ahead.length} of ${tested.length}`, "methods"]);
  }
  tiles.push(["methods", String(data.rows.length), `${data.runs} runs`]);
  for (const [name, value, more] of tiles) {
    byId("tiles").append(html("div", {}, html("dt", {}, name),
      html("dd", {}, value, html("small", {}, more))));
  }
}

function chip(row) {
  const button = html("button", { type: "button", class: "chip", "aria-pressed": "true" },
    dot(row), label(row));
  button.addEventListener("click", () => {
    if (!chosen.delete(row.name)) chosen.add(row.name);
    button.setAttribute("aria-pressed", String(chosen.has(row.name)));
    drawAll();
  });
  return button;
}

function buildFilter() {
  const chips = byId("chips");
  for (const family of data.families) {
    const members = data.rows.filter((row) => row.family === family);
    chips.append(html("div", { class: "group" }, html("span", {}, family), ...members.map(chip)));
  }
  if (!data.families.length) chips.append(...data.rows.map(chip));
  const choose = (all) => {
    for (const row of data.rows) all ? chosen.add(row.name) : chosen.delete(row.name);
    for (const button of chips.querySelectorAll(".chip")) {
      button.setAttribute("aria-pressed", String(all));
    }
    drawAll();
  };
  byId("all").addEventListener("click", () => choose(true));
  byId("none").addEventListener("click", () => choose(false));
}

function buildCharts() {
  byId("compute-card").hidden = !data.curves.length;
  byId("load-card").hidden = !data.rows.some((row) => Object.keys(row.load).length);
  const ablations = data.curves.some((curve) => curve.random);
  byId("ablations").checked = ablations && data.rows.length <= FEW;
  byId("ablations-label").hidden = !ablations;
  byId("axis").addEventListener("change", drawAll);
  byId("ablations").addEventListener("change", drawAll);
  byId("compute-text").textContent = "Training loss, each point the mean of the steps since the one "
    + "before. Compute counts three times the active FLOPs of the forward pass; trees and the "
    + "strongest-neuron layers compute more than that while training, which time shows. The first "
    + "quarter of a run is cut off above."
    + (ablations && data.rows.length > FEW ? " Point at a curve to see its random routing, dashed." : "");
}

function buildNotes() {
  byId("notes").append(...data.notes.map((note) => html("li", {}, note)));
  if (data.rows.some((row) => !row.causal)) {
    byId("notes").append(html("li", {}, "† not causal."));
  }
  for (const { runs, ...version } of data.versions) {
    const parts = Object.entries(version).map(([name, value]) => `${name} ${value}`);
    byId("notes").append(html("li", {}, `${runs} runs: ${parts.join(", ")}.`));
  }
  const again = byId("again");
  if (data.command) {
    again.append(html("p", {}, "Made by"), html("pre", {}, html("code", {}, data.command)));
  }
  if (data.config) {
    again.append(html("details", {}, html("summary", {}, "config.yaml, in full"),
      html("pre", {}, html("code", {}, data.config))));
  }
  const list = document.querySelector("#columns dl");
  for (const column of data.columns) {
    list.append(html("dt", {}, column.name), html("dd", {}, column.help));
  }
}

function signed(value) {
  return `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;
}

function buildClaims() {
  byId("claims-card").hidden = !data.claims.length;
  const names = ["claim", "paper", "verdict", "compared", "measure", "difference", "95 % interval"];
  const head = names.map((name, n) => html("th", { scope: "col", class: n > 4 ? "number" : "" }, name));
  const body = html("tbody");
  for (const claim of data.claims) {
    claim.contests.forEach(({ lower, higher, gain, interval, verdict }, n) => {
      const line = html("tr", { class: verdict });
      if (n === 0) {
        const rows = { rowspan: claim.contests.length };
        line.append(html("td", { ...rows, class: "says" }, claim.says),
          html("td", { ...rows, class: "paper" }, claim.paper), html("td", { ...rows, class: claim.verdict }, claim.verdict));
      }
      line.append(html("td", {}, `${lower} < ${higher}`), html("td", {}, claim.measure),
        html("td", { class: "number" }, gain ? signed(gain[0]) : data.nothing),
        html("td", { class: "number" }, interval ? interval.map(signed).join(" to ") : data.nothing));
      body.append(line);
    });
  }
  byId("claims").append(html("thead", {}, html("tr", {}, ...head)), body);
}

function buildTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  let own = null;
  const apply = () => {
    const dark = own === null ? system.matches : own;
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    byId("theme").textContent = dark ? "Light" : "Dark";
    byId("theme").setAttribute("aria-label", `Switch to ${dark ? "light" : "dark"} colours`);
  };
  byId("theme").addEventListener("click", () => {
    own = document.documentElement.dataset.theme !== "dark";
    apply();
  });
  system.addEventListener("change", apply);
  apply();
}

buildTheme();
buildHeading();
buildClaims();
buildFilter();
buildCharts();
buildNotes();
buildTable(byId("table"));
drawAll();

let drawnWidth = document.documentElement.clientWidth;
addEventListener("resize", () => {
  const width = document.documentElement.clientWidth;
  if (width === drawnWidth) return;
  drawnWidth = width;
  drawAll();
});
addEventListener("scroll", hideTooltip, { passive: true });
