"use strict";

// Sorts a table by the column whose name is chosen, with what is missing always last.

function compare(left, right) {
  const numbers = left !== "" && right !== "" && !isNaN(left) && !isNaN(right);
  return numbers ? left - right : left.localeCompare(right, "en", { numeric: true });
}

function sortBy(table, place, direction) {
  const key = (line) => line.cells[place].dataset.key;
  const body = table.tBodies[0];
  const lines = [...body.rows].sort((a, b) => {
    const [left, right] = [key(a), key(b)];
    if (left === undefined || right === undefined) return (left === undefined) - (right === undefined);
    return direction * compare(left, right) || a.dataset.place - b.dataset.place;
  });
  body.append(...lines);
  [...table.tHead.rows[0].cells].forEach((cell, n) => {
    if (n === place) cell.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    else cell.removeAttribute("aria-sort");
  });
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((cell, place) => {
    cell.querySelector("button").addEventListener("click", () => {
      sortBy(table, place, cell.getAttribute("aria-sort") === "ascending" ? -1 : 1);
    });
  });
}
