"use strict";
document.documentElement.classList.add("scripted");
const search = document.querySelector("input[type=search]");
if (search) {
  const rows = [...document.querySelectorAll("table.sites tbody tr")];
  search.addEventListener("input", () => {
    const wanted = search.value.toLowerCase();
    for (const row of rows) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
    }
  });
}
