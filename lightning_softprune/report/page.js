// Sorts the table of trials by a click on (or Enter or Space at) a column's head.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const value = {
    number: (text) => (/^-?inf$/.test(text) ? (text[0] === "-" ? -Infinity : Infinity) : text ? Number(text) : NaN),
    text: (text) => text,
  };
  heads.forEach((head, column) => {
    head.firstElementChild.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows].map((row) => [
        value[head.dataset.kind](row.cells[column].textContent),
        row,
      ]);
      const missing = (key) => Number.isNaN(key) || key === ""; // last, whichever way
      rows.sort(([a], [b]) => missing(a) - missing(b) || (missing(a) ? 0 : sign * ((a > b) - (a < b))));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  });
}
