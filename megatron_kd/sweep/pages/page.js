"use strict";
// Sorts a table by the column whose heading is pressed: numbers by data-value, missing ones last, words in natural order.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      const numeric = heading.classList.contains("number");
      const key = (row) => (numeric ? row.cells[column].dataset.value : row.cells[column].textContent);
      const compare = (one, two) => {
        const [a, b] = [key(one), key(two)];
        if (numeric && (a === "" || b === "")) return (a === "") - (b === "");
        const order = numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true });
        return down ? -order : order;
      };
      const rows = [...table.tBodies[0].rows].sort(compare);
      table.tBodies[0].append(...rows);
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    });
  });
}
