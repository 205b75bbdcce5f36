// A click on a heading sorts the table, a second click reverses the order; empty cells stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  headings.forEach((heading, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const numeric = heading.classList.contains("number");
      const rows = [...table.tBodies[0].rows].map((row) => {
        const cell = row.cells[index];
        return { row, value: cell.dataset.sort ?? cell.textContent };
      });
      rows.sort((a, b) => {
        if (!a.value || !b.value) return Number(!a.value) - Number(!b.value);
        const order = numeric ? a.value - b.value : a.value.localeCompare(b.value, "en", { numeric: true });
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows.map(({ row }) => row));
    });
  });
}
