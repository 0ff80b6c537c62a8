"use strict";

// What every chart needs: elements, scales, numbers as text, the tooltip, and labels kept apart.

const NAMESPACE = "http://www.w3.org/2000/svg";

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function html(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const tint = (row) => `--light: ${row.color[0]}; --dark: ${row.color[1]}`;

const dot = (row) => html("span", { class: "dot tinted", style: tint(row), "aria-hidden": "true" });

const byId = (id) => document.getElementById(id);

function linear(from, to, start, end) {
  const scale = (value) => start + ((value - from) / (to - from || 1)) * (end - start);
  return Object.assign(scale, { ticks: (count) => niceTicks(from, to, count) });
}

function logarithmic(from, to, start, end) {
  const inner = linear(Math.log(from), Math.log(to), start, end);
  const scale = (value) => inner(Math.log(value));
  return Object.assign(scale, { ticks: (count) => logTicks(from, to, count) });
}

function niceTicks(from, to, count) {
  const rough = (to - from) / Math.max(3, count);
  const power = 10 ** Math.floor(Math.log10(rough || 1));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const found = [];
  for (let n = Math.ceil(from / step - 1e-9); n * step <= to + step * 1e-9; n++) {
    found.push(Number((n * step).toPrecision(12)));
  }
  return found;
}

function logTicks(from, to, count) {
  for (const factors of [[1, 2, 5], [1, 3], [1]]) {
    const found = [];
    for (let power = Math.floor(Math.log10(from)); 10 ** power <= to; power++) {
      for (const factor of factors) {
        const value = Number((factor * 10 ** power).toPrecision(12));
        if (value >= from && value <= to) found.push(value);
      }
    }
    if (found.length <= count || factors.length === 1) return found;
  }
  return [];
}

// Writes ticks with as many digits as the finest of them needs.
function tickText(ticks) {
  const digits = Math.max(0, ...ticks.map((tick) => (String(tick).split(".")[1] ?? "").length));
  return (tick) => tick.toFixed(Math.min(digits, 6));
}

// Widens a range so that nothing is drawn on its edge.
function padded(values, share = 0.06) {
  const low = Math.min(...values), high = Math.max(...values);
  const room = (high - low) * share || Math.abs(high) * share || 1;
  return [low - room, high + room];
}

// The same, never so narrow that sizes which are all but equal look far apart.
function around(sizes) {
  const low = Math.min(...sizes), high = Math.max(...sizes);
  return padded([Math.min(low, 0.9 * high), Math.max(high, low / 0.9)], 0.06);
}

function short(value) {
  const units = ["", " k", " M", " G", " T", " P", " E"];
  let place = 0;
  let rest = value;
  while (Math.abs(rest) >= 999.5 && place < units.length - 1) { rest /= 1000; place++; }
  return `${Number(rest.toPrecision(3))}${units[place]}`;
}

function raised(power) {
  return `10${[...String(power)].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit] ?? "⁻").join("")}`;
}

function withError(mean, digits = 3) {
  if (!mean) return data.nothing;
  const error = mean[1] === null ? "" : ` ± ${mean[1].toFixed(digits)}`;
  return `${mean[0].toFixed(digits)}${error}`;
}

const canvas = document.createElement("canvas").getContext("2d");

function textWidth(text, size = 12.5) {
  canvas.font = `${size}px ${getComputedStyle(document.body).fontFamily}`;
  return canvas.measureText(text).width;
}

function clipped(text, room, size) {
  if (textWidth(text, size) <= room) return text;
  let kept = text;
  while (kept.length > 1 && textWidth(`${kept}…`, size) > room) kept = kept.slice(0, -1);
  return `${kept}…`;
}

// Moves sorted places apart to at least `gap`; groups that touch move as one.
function spread(places, gap, low, high) {
  const inside = (middle, members) => {
    const half = (gap * (members - 1)) / 2;
    return 2 * half < high - low ? Math.max(low + half, Math.min(high - half, middle)) : middle;
  };
  const groups = [];
  for (const place of places) {
    let group = { middle: inside(place, 1), members: 1 };
    while (groups.length) {
      const other = groups[groups.length - 1];
      const members = group.members + other.members;
      if (group.middle - other.middle >= (gap * members) / 2 - 1e-9) break;
      groups.pop();
      const sum = group.middle * group.members + other.middle * other.members;
      group = { middle: inside(sum / members, members), members };
    }
    groups.push(group);
  }
  return groups.flatMap(({ middle, members }) =>
    Array.from({ length: members }, (_, n) => middle + gap * (n - (members - 1) / 2)));
}

function showTooltip(event, row, title, pairs) {
  const box = byId("tooltip");
  const list = html("dl");
  for (const [name, value] of pairs) list.append(html("dt", {}, name), html("dd", {}, value));
  box.replaceChildren(html("strong", {}, dot(row), title), list);
  box.hidden = false;
  const { width, height } = box.getBoundingClientRect();
  const { clientWidth, clientHeight } = document.documentElement;
  const right = event.clientX + 16 + width < clientWidth;
  const left = right ? event.clientX + 16 : Math.max(6, event.clientX - width - 16);
  const top = Math.max(6, Math.min(event.clientY + 14, clientHeight - height - 6));
  box.style.left = `${left}px`;
  box.style.top = `${top}px`;
}

function hideTooltip() {
  byId("tooltip").hidden = true;
  focusRow(null);
}

// Brings one method to the front, in every chart at once.
function focusRow(name) {
  document.body.classList.toggle("focusing", name !== null);
  for (const element of document.querySelectorAll("[data-row]")) {
    element.classList.toggle("focus", element.dataset.row === name);
  }
}

function marks(row, attributes = {}, ...children) {
  const group = { class: "tinted", style: tint(row), "data-row": row.name };
  return svg("g", { ...group, ...attributes }, ...children);
}

function canvasFor(host, height, label) {
  const width = Math.max(240, host.clientWidth);
  const root = svg("svg", {
    viewBox: `0 0 ${width} ${height}`, height, role: "img",
    "aria-label": `${label}; the numbers are in the table`,
  });
  host.append(root);
  return [root, width];
}

function nothingShown(host) {
  host.replaceChildren(html("p", { class: "none" }, "No method is chosen."));
}
