// The table: sorted by any column, with what is missing always last.

const order = { column: -1, direction: 1 };

function buildTable(table) {
  const line = html("tr");
  data.columns.forEach((column, place) => {
    const button = html("button", { type: "button", title: column.help },
      column.name.replace(/ ([−÷])/, "\u00a0$1"));
    button.addEventListener("click", () => {
      order.direction = order.column === place ? -order.direction : 1;
      order.column = place;
      sortTable(table);
    });
    line.append(html("th", { scope: "col", class: column.numeric ? "number" : "" }, button));
  });
  const body = html("tbody", {}, ...data.rows.map(tableRow));
  table.append(html("thead", {}, line), body);
  order.column = data.columns.findIndex((column) => column.name === "val loss");
  sortTable(table);
}

function tableRow(row, place) {
  const line = html("tr", { "data-row": row.name, "data-place": place });
  [label(row), ...row.cells.slice(1)].forEach((text, n) => {
    const classes = [
      data.columns[n].numeric ? "number" : "",
      text === data.nothing ? "none" : "",
    ].join(" ").trim();
    const cell = html("td", classes ? { class: classes } : {}, text);
    if (n === 0) cell.prepend(dot(row));
    line.append(cell);
  });
  return line;
}

function compare(left, right) {
  if (typeof left === "number" && typeof right === "number") return left - right;
  return String(left).localeCompare(String(right), "en", { numeric: true });
}

function sortTable(table) {
  const { column, direction } = order;
  const lines = [...table.tBodies[0].rows].sort((a, b) => {
    const [left, right] = [a, b].map((line) => data.rows[line.dataset.place].keys[column]);
    if (left === null || right === null) return (left === null) - (right === null);
    return direction * compare(left, right) || a.dataset.place - b.dataset.place;
  });
  table.tBodies[0].append(...lines);
  [...table.tHead.rows[0].cells].forEach((cell, place) => {
    if (place === column) cell.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    else cell.removeAttribute("aria-sort");
  });
}
