// Sorts tables by a click on (or Enter or Space at) a column's head, saves figures, says where a box scrolls.
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

// A figure as a file: its drawing with the styles that the page gives it written into it.
const PROPERTIES = [
  "fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-linecap", "stroke-linejoin",
  "stroke-opacity", "font-family", "font-size", "font-weight", "text-anchor",
];
function drawing(figure) {
  const shown = figure.querySelector(":scope > svg");
  const copy = shown.cloneNode(true);
  const styled = [shown, ...shown.querySelectorAll("*")];
  [copy, ...copy.querySelectorAll("*")].forEach((element, number) => {
    const style = getComputedStyle(styled[number]);
    PROPERTIES.forEach((name) => element.style.setProperty(name, style.getPropertyValue(name)));
  });
  const [left, top, width, height] = shown.getAttribute("viewBox").split(" ").map(Number);
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  const paper = document.createElementNS(copy.namespaceURI, "rect");
  Object.entries({ x: left, y: top, width, height }).forEach(([name, value]) => paper.setAttribute(name, value));
  paper.style.fill = getComputedStyle(document.body).backgroundColor;
  copy.prepend(paper);
  return { text: new XMLSerializer().serializeToString(copy), width, height };
}
function save(address, name) {
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
}
const asAddress = (text) => "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text);
const saving = {
  SVG: (figure, name) => save(asAddress(drawing(figure).text), name + ".svg"),
  PNG: (figure, name) => {
    const { text, width, height } = drawing(figure);
    const image = new Image();
    image.onload = () => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [3 * width, 3 * height];
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      save(canvas.toDataURL("image/png"), name + ".png");
    };
    image.src = asAddress(text);
  },
};
for (const figure of document.querySelectorAll("figure")) {
  if (!figure.querySelector(":scope > svg")) continue;
  const title = figure.querySelector("svg > title").textContent;
  const name = title.replace(/[^\w.-]+/g, "_");
  const box = document.createElement("div");
  box.className = "save";
  for (const [kind, run] of Object.entries(saving)) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = kind;
    button.setAttribute("aria-label", `Save ${title} as ${kind}`);
    button.addEventListener("click", () => run(figure, name));
    box.append(button);
  }
  figure.prepend(box);
}

// What lies beyond the edges of a box that scrolls, in words.
function tell(box) {
  const hint = box.nextElementSibling;
  const ways = [];
  if (box.scrollWidth > box.clientWidth + 1) ways.push("sideways");
  if (box.scrollHeight > box.clientHeight + 1) ways.push("down");
  hint.textContent = ways.length ? `Scroll ${ways.join(" and ")} for more` : "";
  hint.hidden = !ways.length;
}
for (const box of document.querySelectorAll(".scroll")) {
  const hint = document.createElement("p");
  hint.className = "beyond";
  box.after(hint);
  tell(box);
  new ResizeObserver(() => tell(box)).observe(box);
}
