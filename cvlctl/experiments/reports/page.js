for (const head of document.querySelectorAll("table:not(.fixed) thead th")) {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const table = head.closest("table"), body = table.tBodies[0], at = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending" || (head.className === "n" && !head.hasAttribute("aria-sort"));
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    table.classList.add("sorted");
    const value = row => row.cells[at].dataset.v;
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === undefined && y === undefined) return a.cells[at].textContent.localeCompare(b.cells[at].textContent, "en", {numeric: true});
      return x === undefined ? 1 : y === undefined ? -1 : x - y;
    });
    if (down) rows.reverse();
    body.append(...rows);
  });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(one => { one.open = true; }));
